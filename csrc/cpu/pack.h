// Packing: columns of B into panels, features of A into [k][rows], both as 32-bit items.
#pragma once
#include "micro.h"

namespace moe {
namespace MOE_LEVEL {
namespace {

template <class C>
inline int64_t items_of(int64_t elements) {
  return (elements + C::kPair - 1) / C::kPair;
}

template <class C>
inline const uint32_t* items_at(const void* base, int64_t elements) {
  return reinterpret_cast<const uint32_t*>(static_cast<const typename C::Elem*>(base) + elements);
}

// Two consecutive k of `width` columns as items: even[c] in the low half, odd[c] in the high half.
template <int half>
struct Zip {
  static constexpr int at(int i) { return half * W + i / 2 + i % 2 * 2 * W; }
};
template <int width = NR>
inline void zip(vh2 even, vh2 odd, uint32_t* out) {
  storeu(out, permute<Zip<0>>(even, odd));
  if constexpr (width == NR) storeu(out + W, permute<Zip<1>>(even, odd));
}

// Panels of a K-major source, n valid columns, k_valid valid k: item (k, c) of the panel from source[k * ld + c], or
// the pair (2k, c), (2k + 1, c). width = W fills half of each panel. Rows of the source may lie a page apart: so many
// of them are read for all panels before the next, which are asked for meanwhile, as the TLB of first level knows.
template <class C, int width = NR, class S>
inline void pack_natural(const S* source, int64_t ld, int64_t k_valid, int64_t n, int64_t panels, int64_t panel_items,
                         uint32_t* out) {
  constexpr int64_t kRows = 32 * C::kPair;
  for (; k_valid > 0; k_valid -= kRows, source += kRows * ld, out += kRows / C::kPair * NR)
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t c = p * width, rows = k_valid < kRows ? k_valid : kRows;
      const S* from = source + c;
      uint32_t* to = out + p * panel_items * NR;
      for (int64_t k = 0; k < rows; k += C::kPair, from += C::kPair * ld, to += NR) {
        for (int row = 0; row < C::kPair; ++row)
          for (int at = 0; at < width; at += kLine / int(sizeof(S))) __builtin_prefetch(from + (kRows + row) * ld + at);
        if constexpr (C::kPair == 1) {
          storeu(to, load(from, n - c));
          if constexpr (width == NR) storeu(to + W, load(from + W, n - c - W));
        } else {
          zip<width>(load_n<vh2>(from, n - c), k + 1 < rows ? load_n<vh2>(from + ld, n - c) : vh2{}, to);
        }
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

// With so few rows of tokens the products before have no time to bring weights into L2 (Ahead): packing asks for them,
// since rows of weights are too short for the hardware's prefetchers. With more rows that costs up to 7 %.
constexpr int64_t kFewRows = 12, kRowsAhead = 2 * W;

// W columns from W rows of a (columns, K) source: the transpose of pack_natural.
template <class C, class S>
inline void pack_transposed(const S* source, int64_t ld, int64_t k_valid, int64_t n, uint32_t* out, bool fetch) {
  const int64_t items = (k_valid + C::kPair - 1) / C::kPair;
  for (int64_t k = 0; k < items; k += W) {
    vu rows[W];
    if (fetch && k * 4 % kLine == 0)
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) __builtin_prefetch(source + (r + kRowsAhead) * ld + k * C::kPair);
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

// B of a product, (k, column), in its owner's memory: where k_major element (k, c) is at
// k * ld + c, else at c * ld + k.
template <class C>
struct Factor {
  const typename C::Store* data;
  int64_t ld;
  bool k_major;

  Factor at(int64_t k, int64_t column) const {
    return {data + (k_major ? k * ld + column : column * ld + k), ld, k_major};
  }
  // The stored rectangle of the first `count` k and `columns` columns, for prefetches.
  void ahead(Ahead& ahead, int64_t count, int64_t columns) const {
    constexpr int64_t kBytes = sizeof(typename C::Store);
    ahead.block(data, ld * kBytes, k_major ? count : columns, (k_major ? columns : count) * kBytes);
  }
};
// A weight as B: its inputs contracted (forward), or its outputs (backward).
template <class C>
inline Factor<C> over_inputs(const Matrix& weight) {
  return {static_cast<const typename C::Store*>(weight.data), weight.ld, weight.transposed};
}
template <class C>
inline Factor<C> over_outputs(const Matrix& weight) {
  return {static_cast<const typename C::Store*>(weight.data), weight.ld, !weight.transposed};
}

// Panels of the first k_valid k and n columns of a factor: the same bits from either order of it. fetch: see kFewRows.
template <class C, int width = NR>
inline void pack_panels(const Factor<C>& b, int64_t k_valid, int64_t n, int64_t panels, int64_t panel_items,
                        uint32_t* out, bool fetch = false) {
  if (b.k_major) return pack_natural<C, width>(b.data, b.ld, k_valid, n, panels, panel_items, out);
  for (int64_t c = 0; c < panels * width; c += width, out += panel_items * NR)
    for (int v = 0; v < width; v += W)
      pack_transposed<C>(b.data + (c + v) * b.ld, b.ld, k_valid, n - c - v, out + v, fetch);
}

// How a contraction over rows reads A: bf16 packed into pairs, tile by tile; fp32 where it lies, unless a tile is less
// than half a line of it: then packed, four tiles in one pass over the rows, which lie a page apart.
template <class C>
constexpr int kTilesPacked = C::kPair == 2 ? 1 : 4 * (2 * MR * 4 < kLine);
constexpr int64_t kPackedTile = kChunkItems * MR + NR;

// Tiles [begin, end) of A packed for a contraction over rows, from element (row, feature): each [k item][its features],
// kPackedTile items behind the one before. What spills over is overwritten next.
template <class C>
inline void pack_features(const typename C::Elem* source, int64_t ld, int64_t k_valid, const Tiles& tiles,
                          int64_t begin, int64_t end, uint32_t* packed) {
  static_assert(MR <= 2 * W, "two vectors hold the features of a tile");
  struct {
    int64_t feature, count;
    uint32_t* to;
  } tile[kTilesPacked<C>];
  for (int64_t i = begin; i < end; ++i)
    tile[i - begin] = {tiles.begin(i), tiles.begin(i + 1) - tiles.begin(i), packed + (i - begin) * kPackedTile};
  for (int64_t k = 0; k < k_valid; k += C::kPair, source += C::kPair * ld)
    for (int64_t i = 0; i < end - begin; ++i) {
      const typename C::Elem* from = source + tile[i].feature;
      if constexpr (C::kPair == 2) {
        zip(loadu<vh2>(from), k + 1 < k_valid ? loadu<vh2>(from + ld) : vh2{}, tile[i].to);
      } else {
        storeu(tile[i].to, loadu<vf>(from));
        if constexpr (MR > W) storeu(tile[i].to + W, loadu<vf>(from + W));
      }
      tile[i].to += tile[i].count;
    }
}

}  // namespace
}  // namespace MOE_LEVEL
}  // namespace moe
