// Per-token kernels of one ISA level: combine and the router's products; and the peak loop.
#pragma once
#include "micro.h"

namespace moe {
namespace MOE_LEVEL {
namespace {

template <class Y, class S>
void combine(const void* y, const float* row_weight, const int32_t* token_row_offsets, const int32_t* token_rows,
             const void* shared, void* out, int64_t H, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t)
    for (int64_t h = 0; h < H; h += W) {
      const int64_t n = H - h;
      vf value{};
      for (int32_t i = token_row_offsets[t]; i < token_row_offsets[t + 1]; ++i) {
        const int64_t row = token_rows[i];
        const vf routed = load(static_cast<const Y*>(y) + row * H + h, n);
        value += row_weight ? row_weight[row] * routed : routed;
      }
      // last: one rounding at its magnitude instead of one per row
      if (shared) value += load(static_cast<const Y*>(shared) + t * H + h, n);
      store(static_cast<S*>(out) + t * H + h, value, n);
    }
}

constexpr int kExpertBlock = 8;  // experts whose sums are held in registers together

template <class S>
void logits(const void* x, const float* weight, float* out, int64_t H, int64_t E, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t)
    for (int64_t e = 0; e < E; e += kExpertBlock) {
      const S* row = static_cast<const S*>(x) + t * H;
      const int count = int(min64(kExpertBlock, E - e));
      vf acc[kExpertBlock] = {};
      for (int64_t h = 0; h < H; h += W) {
        const vf value = load(row + h, H - h);
        for (int i = 0; i < count; ++i) acc[i] += value * load(weight + (e + i) * H + h, H - h);
      }
      for (int i = 0; i < count; ++i) out[t * E + e + i] = sum(acc[i]);
    }
}

template <class S>
void logits_dx(const float* dlogits, const float* weight, void* dx, int64_t H, int64_t E, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t)
    for (int64_t h = 0; h < H; h += W) {
      vf value{};
      for (int64_t e = 0; e < E; ++e) value += dlogits[t * E + e] * load(weight + e * H + h, H - h);
      store(static_cast<S*>(dx) + t * H + h, value, H - h);
    }
}

template <class S>
void logits_dweight(const float* dlogits, const void* x, float* dweight, int64_t T, int64_t H, int64_t E, int64_t begin,
                    int64_t end) {
  constexpr int64_t kBlock = 256;  // sums of sums: rounding grows with sqrt(256 + T/256), not sqrt(T)
  for (int64_t h = begin; h < end; h += W)
    for (int64_t e = 0; e < E; e += kExpertBlock) {
      const int count = int(min64(kExpertBlock, E - e));
      const int64_t n = min64(end - h, H - h);
      vf total[kExpertBlock] = {};
      for (int64_t t0 = 0; t0 < T; t0 += kBlock) {
        vf acc[kExpertBlock] = {};
        for (int64_t t = t0; t < min64(T, t0 + kBlock); ++t) {
          const vf value = load(static_cast<const S*>(x) + t * H + h, n);
          for (int i = 0; i < count; ++i) acc[i] += dlogits[t * E + e + i] * value;
        }
        for (int i = 0; i < count; ++i) total[i] += acc[i];
      }
      for (int i = 0; i < count; ++i) store(dweight + (e + i) * H + h, total[i], n);
    }
}

template <class C>
double peak(int64_t iterations) {
  alignas(64) uint32_t a[MR] = {};
  alignas(64) uint32_t b[NR] = {};
  vf acc[MR][2] = {};
  asm volatile("" : : "r"(a), "r"(b) : "memory");
  const vf b0 = loadu<vf>(b), b1 = loadu<vf>(b + W);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) asm volatile("" : "+x"(acc[r][0]), "+x"(acc[r][1]));  // not known to be equal
  for (int64_t k = 0; k < iterations; ++k) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      multiply_add<C>(acc[r][0], a, b0);
      multiply_add<C>(acc[r][1], a, b1);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) asm volatile("" : : "x"(acc[r][0]), "x"(acc[r][1]));
  return double(iterations) * MR * NR * C::kPair * 2;
}

}  // namespace
}  // namespace MOE_LEVEL
}  // namespace moe
