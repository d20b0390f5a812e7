// The register tile every GEMM is made of:  (mr <= MOE_MR rows) x (panel of 2W columns), K in 32-bit items (a float, or
// two bf16). B is packed into panels [k][2W], A is read by broadcast, the accumulators stay in registers.
#pragma once
#include "kernels.h"
#include "prefetch.h"

namespace moe {
namespace MOE_LEVEL {
namespace {

constexpr int MR = MOE_MR;
constexpr int NR = 2 * W;
constexpr int64_t kRegisterItems = 256;
// With vectors of 32 bytes instructions are what is scarce (12 multiply-adds of 20 a step of K): steps are unrolled, B
// is left to the hardware's prefetchers, and a stream gets a line every other step.
constexpr bool kPrefetchB = W > 8;
constexpr int kSteps = W > 8 ? 1 : 4, kStreamSteps = W > 8 ? 1 : 2;
constexpr int64_t kFeatureTiles = (kGradFeatures + MR - 1) / MR;

struct Float32 {
  using Store = float;
  using Elem = float;  // of the compute buffers
  static constexpr int kPair = 1;
};
template <class S>
struct Widened {
  using Store = S;
  using Elem = float;
  static constexpr int kPair = 1;
};
struct Pairs {
  using Store = bf16;
  using Elem = bf16;
  static constexpr int kPair = 2;
};

#if MOE_BF16_PAIRS
using BFloat16 = Pairs;
#else
using BFloat16 = Widened<bf16>;
#endif

template <class C>
inline void multiply_add(vf& acc, const uint32_t* a, vf b) {
#if MOE_BF16_PAIRS
  if constexpr (C::kPair == 2) {
    acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(int(*a)), (__m512bh)b);
    return;
  }
#endif
  float value;
  std::memcpy(&value, a, 4);
#if MOE_W == 8
  // GCC would fold loads of B into the multiply-adds, one each, or move accumulators about and spill them (10 to 25 %).
  asm("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(_mm256_set1_ps(value)), "x"(b));
#else
  acc += value * b;
#endif
}
// Hides a value from the optimizer, which then only knows that it is in a register.
inline void keep([[maybe_unused]] vf& v) {
#if MOE_W == 8
  asm("" : "+x"(v));
#endif
}
inline void keep([[maybe_unused]] int64_t& n) {
#if MOE_W == 8
  asm("" : "+r"(n));
#endif
}

// Where A(r, k) is read: a[r * lda + k], or a[k * lda + r] when kColumns. The latter's rows lie side by side; the
// former's share a base three by three, since x86 reaches base, base + lda and base + 2 lda in one address.
template <bool kColumns, int rows>
struct Rows {
  static constexpr int kBases = kColumns ? 1 : (rows + 2) / 3;
  const uint32_t* base[kBases];
  int64_t lda;
  Rows(const uint32_t* a, int64_t lda) : lda(lda) {
#pragma GCC unroll 8
    for (int g = 0; g < kBases; ++g) base[g] = a + 3 * g * lda;
  }
  // Packed features (pack_features) have `rows` values side by side: then everything but the base is a constant.
  int64_t step() const { return kColumns && W <= 8 ? rows : lda; }
  const uint32_t* at(int r, int64_t k) const {
    return kColumns ? base[0] + k * step() + r : base[r / 3] + (r % 3) * lda + k;
  }
  void advance(int64_t k) {
#pragma GCC unroll 8
    for (int g = 0; g < kBases; ++g) base[g] += kColumns ? k * step() : k;
    keep(lda);  // else GCC keeps lda + 1, lda + 2 ... in registers, too, which are not there
  }
};

// acc += A B over `steps` steps of K, and one line prefetched along `ahead` at the first of them where kAhead.
template <class C, int steps, bool kAhead, bool kColumns, int rows>
inline __attribute__((always_inline)) void multiply(vf (&acc)[rows][2], Rows<kColumns, rows>& a, const uint32_t*& b,
                                                    Stream& ahead) {
  constexpr int kNear = 8 * MR / rows;  // k steps: few rows need the next line sooner
  if (kAhead) {
    __builtin_prefetch(ahead.at, 0, 2);
    ahead.at += ahead.step;
  }
#pragma GCC unroll 8
  for (int s = 0; s < steps; ++s) {
    vf b0 = loadu<vf>(b + s * NR), b1 = loadu<vf>(b + s * NR + W);
    keep(b0), keep(b1);
    if (kPrefetchB) {
      __builtin_prefetch(b + (s + kNear) * NR);
      if (NR * 4 > kLine) __builtin_prefetch(b + (s + kNear) * NR + W);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      multiply_add<C>(acc[r][0], a.at(r, s), b0);
      multiply_add<C>(acc[r][1], a.at(r, s), b1);
    }
  }
  a.advance(steps);
  b += steps * NR;
}

// out[r * ldo + 0..2W) (+)= sum over k of A(r, k) B(k, :).
// Registers are emptied into `out` every kRegisterItems: rounding errors then grow like those of a blocked sum.
template <class C, bool kColumns, int rows>
void micro(const uint32_t* a_items, int64_t lda, const uint32_t* b, int64_t items, float* out, int64_t ldo, bool add,
           const Streams& streams) {
  constexpr bool kAhead = rows > 4;  // with fewer B comes at the speed of memory, and a stream only delays it (10 %)
  Rows<kColumns, rows> a(a_items, lda);
  const Stream *next = streams.list(), *const last = kAhead ? next + streams.count() : next;
  for (int64_t begin = 0; begin < items; begin += kRegisterItems) {
    vf acc[rows][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) acc[r][0] = acc[r][1] = vf{};
    const int64_t end = min64(items, begin + kRegisterItems);
    int64_t k = begin;
    const Stream none{reinterpret_cast<const char*>(out), 0};
    if constexpr (kSteps == 1) {
      while (k < end) {
        Stream ahead = next != last ? *next++ : none;
        for (const int64_t stop = min64(end, k + kStreamLines); k < stop; ++k) multiply<C, 1, kAhead>(acc, a, b, ahead);
      }
    } else {
      for (; next != last && k + kStreamLines * kStreamSteps <= end; k += kStreamLines * kStreamSteps) {
        Stream ahead = *next++;
        for (int line = 0; line < kStreamLines; ++line) multiply<C, kStreamSteps, true>(acc, a, b, ahead);
      }
      Stream ahead = none;
      for (; k + kSteps <= end; k += kSteps) multiply<C, kSteps, false>(acc, a, b, ahead);
      for (; k < end; ++k) multiply<C, 1, false>(acc, a, b, ahead);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        float* to = out + r * ldo + v * W;
        storeu(to, add ? loadu<vf>(to) + acc[r][v] : acc[r][v]);
      }
    add = true;
  }
}

using Micro = void (*)(const uint32_t*, int64_t, const uint32_t*, int64_t, float*, int64_t, bool, const Streams&);

template <class C, bool kColumns, int rows = MR>
inline Micro micro_for(int count) {
  if constexpr (rows == 0)
    return nullptr;
  else
    return count == rows ? &micro<C, kColumns, rows> : micro_for<C, kColumns, rows - 1>(count);
}

// Rows cut into tiles of nearly equal height: at most two heights occur, none much shorter than MR.
struct Tiles {
  int64_t rows, count;
  explicit Tiles(int64_t r) : rows(r), count((r + MR - 1) / MR) {}
  int64_t begin(int64_t i) const { return rows * i / count; }
};

}  // namespace
}  // namespace MOE_LEVEL
}  // namespace moe
