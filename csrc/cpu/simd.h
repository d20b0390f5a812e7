// Vectors of MOE_W floats in the compiler's own vector language: the same source for every ISA level.
// Included only by kernels_impl.h; nothing here may be a non-static symbol, and no std:: templates may be used
// (the linker would keep one copy, perhaps the one compiled for AVX-512).
#pragma once
#include <cstdint>
#include <cstring>

#include "../core/dtype.h"
#if MOE_W >= 8
#include <immintrin.h>
#endif

namespace moe {
namespace MOE_LEVEL {

constexpr int W = MOE_W;
typedef float vf __attribute__((vector_size(4 * MOE_W)));
typedef int32_t vi __attribute__((vector_size(4 * MOE_W)));
typedef uint32_t vu __attribute__((vector_size(4 * MOE_W)));
typedef uint16_t vh __attribute__((vector_size(2 * MOE_W)));
typedef uint16_t vh2 __attribute__((vector_size(4 * MOE_W)));

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

template <class V, class T>
static inline V loadu(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
static inline void storeu(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
// The first n elements, zeros behind them; nothing past p[n-1] is touched.
template <class V, class T>
static inline V load_n(const T* p, int64_t n) {
  if (n >= int64_t(sizeof(V) / sizeof(T))) return loadu<V>(p);
  if (n <= 0) return V{};
#if MOE_W == 16
  const uint64_t mask = (uint64_t(1) << n) - 1;
  if constexpr (sizeof(T) == 4) return (V)_mm512_maskz_loadu_epi32(__mmask16(mask), p);
  if constexpr (sizeof(T) == 2 && sizeof(V) == 32) return (V)_mm256_maskz_loadu_epi16(__mmask16(mask), p);
  if constexpr (sizeof(T) == 2 && sizeof(V) == 64) return (V)_mm512_maskz_loadu_epi16(__mmask32(mask), p);
#endif
  V v{};
  std::memcpy(&v, p, size_t(n) * sizeof(T));
  return v;
}
template <class V, class T>
static inline void store_n(T* p, V v, int64_t n) {
  if (n >= int64_t(sizeof(V) / sizeof(T))) return storeu(p, v);
  if (n <= 0) return;
#if MOE_W == 16
  const uint64_t mask = (uint64_t(1) << n) - 1;
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_epi32(p, __mmask16(mask), (__m512i)v);
  if constexpr (sizeof(T) == 2 && sizeof(V) == 32) return _mm256_mask_storeu_epi16(p, __mmask16(mask), (__m256i)v);
#endif
  std::memcpy(p, &v, size_t(n) * sizeof(T));
}

static inline vf widen(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }
static inline vh narrow(vf x) {  // round to nearest even; a NaN stays a (quiet) NaN
#if MOE_BF16_PAIRS
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#endif
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const vu nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector((x == x) ? rounded : nan, vh);
}

// The same for fp16; with AVX2 and up in one instruction, else as to_float and assign do it (core/dtype.h).
static inline vf widen_half(vh h) {
#if MOE_W == 16
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif MOE_W == 8
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  const vu wide = __builtin_convertvector(h, vu), magnitude = wide & 0x7FFFu;
  const vu special = (vu)(magnitude >= 0x7C00u) & 0x7F800000u;
  return (vf)((vu)((vf)(magnitude << 13) * 0x1p112f) | special | ((wide & 0x8000u) << 16));
#endif
}
static inline vh narrow_half(vf x) {
#if MOE_W == 16
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif MOE_W == 8
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const vu magnitude = (vu)x & 0x7FFFFFFFu;
  const vu normal = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  const vu subnormal = (vu)((vf)magnitude + 0.5f) - 0x3F000000u;
  vu half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? vu{} + 0x7C00u : half;
  half = x == x ? half : vu{} + 0x7E00u;
  return __builtin_convertvector(half | ((vu)x >> 16 & 0x8000u), vh);
#endif
}

static inline vf load(const float* p, int64_t n) { return load_n<vf>(p, n); }
static inline vf load(const bf16* p, int64_t n) { return widen(load_n<vh>(p, n)); }
static inline vf load(const fp16* p, int64_t n) { return widen_half(load_n<vh>(p, n)); }
static inline void store(float* p, vf v, int64_t n) { store_n(p, v, n); }
static inline void store(bf16* p, vf v, int64_t n) { store_n(p, narrow(v), n); }
static inline void store(fp16* p, vf v, int64_t n) { store_n(p, narrow_half(v), n); }

// exp, clamped to [e^-87, e^87]: 2^n 2^r with |r| <= 1/2 and a minimax polynomial of degree 5, 2e-7 relative near 0;
// precise: of degree 6 with r to full precision, 1 ulp, and zero below e^-87.
template <bool precise = false>
static inline vf vexp(vf x) {
#if MOE_W == 16
  x = (vf)_mm512_min_ps((__m512)x, _mm512_set1_ps(87.f));
  const vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 0);
#else
  x = x < -87.f ? vf{} - 87.f : x;
  x = x > 87.f ? vf{} + 87.f : x;
  const vf n = (x * 1.44269504f + 12582912.f) - 12582912.f;
#endif
  vf r = x * 1.44269502f - n, p;
  if constexpr (precise) {
    r = r + x * 1.92596299e-8f;
    p = r * 1.534581200e-4f + 1.339993122e-3f;
    p = p * r + 9.618488957e-3f;
    p = p * r + 5.550328777e-2f;
    p = p * r + 2.402264689e-1f;
    p = p * r + 6.931472057e-1f;
    p = p * r + 1.f;
  } else {
    p = r * 1.327647198e-3f + 9.675541334e-3f;
    p = p * r + 5.550713274e-2f;
    p = p * r + 2.402211972e-1f;
    p = p * r + 6.931469671e-1f;
    p = p * r + 1.000000072f;
  }
#if MOE_W == 16
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const vf value = (vf)((vi)p + (__builtin_convertvector(n, vi) << 23));
  return precise ? (x > -87.f ? value : vf{}) : value;
#endif
}
// 1/x for 1 <= x <= 1e38. With AVX-512: 14 bits and one Newton step, 1 ulp; the division alone costs as much as exp.
static inline vf reciprocal(vf x) {
#if MOE_W == 16
  const vf y = (vf)_mm512_rcp14_ps((__m512)x);
  return y * (2.f - x * y);
#else
  return 1.f / x;
#endif
}
static inline vf sigmoid(vf x) { return reciprocal(1.f + vexp(-x)); }

// Normal distribution function; density receives exp(-x^2/2)/sqrt(2 pi).
// For z = |x|/sqrt(2): erfc(z) = exp(-z^2) t P(t), t = 1/(1 + z/2), P fitted to erfcx: 2.5e-7 relative in fp32.
static inline vf normal_cdf(vf x, vf& density) {
  const vf z = (x < 0.f ? -x : x) * 0.707106781f;
  const vf e = vexp(-z * z);
  density = e * 0.398942280f;
  const vf t = reciprocal(1.f + 0.5f * z);
  constexpr float kErfcx[] = {2.820933151e-01f, 2.821344273e-01f,  2.464214222e-01f, 1.782110608e-01f,
                              8.237888119e-02f, -3.184982138e-02f, 8.775563544e-02f, -4.078488325e-01f,
                              4.622603388e-01f, -2.227723284e-01f, 4.121590680e-02f};
  vf p = vf{} + kErfcx[10];
#pragma GCC unroll 10
  for (int i = 9; i >= 0; --i) p = p * t + kErfcx[i];
  const vf half_tail = 0.5f * e * t * p;
  return x < 0.f ? half_tail : 1.f - half_tail;
}

// The elements Pattern::at(0), Pattern::at(1), ... of a followed by b.
template <int... i>
struct Indices {};
template <class Pattern, class V, int... i>
static inline V permute(V a, V b, Indices<i...>) {
  return __builtin_shufflevector(a, b, Pattern::at(i)...);
}
template <class Pattern, class V>
static inline V permute(V a, V b) {
  return permute<Pattern>(a, b, Indices<__integer_pack(int(sizeof(V) / sizeof(a[0])))...>{});
}

template <int step>
struct Rotate {
  static constexpr int at(int i) { return (i + step) % W; }
};
static inline float sum(vf v) {
  if constexpr (W > 8) v += permute<Rotate<8>>(v, v);
  if constexpr (W > 4) v += permute<Rotate<4>>(v, v);
  v += permute<Rotate<2>>(v, v);
  v += permute<Rotate<1>>(v, v);
  return v[0];
}

// W x W transpose of 32-bit items: log2(W) rounds of a perfect shuffle between row i and row i + W/2.
static inline void transpose(vu (&rows)[MOE_W]) {
  vu low, high;
  for (int i = 0; i < W / 2; ++i) {
    low[2 * i] = i, low[2 * i + 1] = W + i;
    high[2 * i] = W / 2 + i, high[2 * i + 1] = W + W / 2 + i;
  }
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    vu next[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + W / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + W / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

}  // namespace MOE_LEVEL
}  // namespace moe
