// Packing: columns of B into panels, features of A into [k][rows], both as 32-bit items.
#pragma once
#include "micro.h"

namespace moe {
namespace MOE_LEVEL {
namespace {

inline uint32_t bits(float v) {
  uint32_t out;
  std::memcpy(&out, &v, 4);
  return out;
}

// Two consecutive k of one column as one item.
inline vu zip(vh even, vh odd) { return __builtin_convertvector(even, vu) | (__builtin_convertvector(odd, vu) << 16); }

// W columns of a K-major source: item (k, c) from source[(k * pair + p) * ld + c]; n valid columns, k_valid valid k.
template <class C, class S>
inline void pack_natural(const S* source, int64_t ld, int64_t k_valid, int64_t n, uint32_t* out) {
  if constexpr (C::kPair == 1) {
    for (int64_t k = 0; k < k_valid; ++k) storeu(out + k * NR, load(source + k * ld, n));
  } else {
    for (int64_t k = 0; k < k_valid; k += 2) {
      const vh even = load_n<vh>(source + k * ld, n);
      const vh odd = k + 1 < k_valid ? load_n<vh>(source + (k + 1) * ld, n) : vh{};
      storeu(out + k / 2 * NR, zip(even, odd));
    }
  }
}

// W items along K of one row; `valid` elements are there, the rest is zero.
template <class C, class S>
inline vu load_items(const S* row, int64_t valid) {
  if constexpr (C::kPair == 1) {
    return (vu)load(row, valid);
  } else {
    if (valid >= 2 * W) return loadu<vu>(row);
    vu items{};
    if (valid > 0) std::memcpy(&items, row, size_t(valid) * sizeof(S));
    return items;
  }
}

// W columns from W rows of a (columns, K) source: the transpose of pack_natural.
template <class C, class S>
inline void pack_transposed(const S* source, int64_t ld, int64_t k_valid, int64_t n, uint32_t* out) {
  const int64_t items = (k_valid + C::kPair - 1) / C::kPair;
  for (int64_t k = 0; k < items; k += W) {
    vu rows[W];
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r)
      rows[r] = r < n ? load_items<C>(source + r * ld + k * C::kPair, k_valid - k * C::kPair) : vu{};
    transpose(rows);
    const int64_t left = items - k;
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r)
      if (r < left) storeu(out + (k + r) * NR, rows[r]);
  }
}

// A packed for a contraction over rows, two rows per item: [k item][count] from element (row, feature).
template <class C>
inline void pack_features(const bf16* source, int64_t ld, int64_t k_valid, int count, uint32_t* out) {
  constexpr int kVectors = (MR + W - 1) / W;  // whole vectors are copied; what spills over is overwritten next
  for (int64_t k = 0; k < k_valid; k += 2, source += 2 * ld, out += count)
    for (int v = 0; v < kVectors; ++v)
      storeu(out + v * W, zip(loadu<vh>(source + v * W), k + 1 < k_valid ? loadu<vh>(source + ld + v * W) : vh{}));
}

}  // namespace
}  // namespace MOE_LEVEL
}  // namespace moe
