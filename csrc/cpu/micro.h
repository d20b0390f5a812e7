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
constexpr int64_t kChunkPanels = panels_in_l2(kChunkItems, NR);
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
  acc += value * b;
}

// out[r * ldo + 0..2W) (+)= sum over k of A(r, k) B(k, :). A(r, k) = a[r * lda + k], or a[k * lda + r] when kColumns.
// Registers are emptied into `out` every kRegisterItems: rounding errors then grow like those of a blocked sum.
template <class C, bool kColumns, int rows>
void micro(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t items, float* out, int64_t ldo, bool add,
           const Streams& streams) {
  constexpr int kNear = 8 * MR / rows;  // k steps: few rows need the next line sooner
  constexpr bool kAhead = rows > 4;  // with fewer B comes at the speed of memory, and a stream only delays it (10 %)
  constexpr int kBases = kColumns ? 1 : (rows + 2) / 3;  // x86 reaches base, base + lda and base + 2 lda in one address
  const uint32_t* base[kBases];
#pragma GCC unroll 8
  for (int g = 0; g < kBases; ++g) base[g] = a + 3 * g * lda;
  const Stream *stream = streams.list(), *const last = stream + streams.count();
  for (int64_t begin = 0; begin < items; begin += kRegisterItems) {
    vf acc[rows][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) acc[r][0] = acc[r][1] = vf{};
    const int64_t end = min64(items, begin + kRegisterItems);
    for (int64_t k = begin; k < end;) {
      const char* ahead = reinterpret_cast<const char*>(out);
      int64_t step = 0;
      if (stream != last) ahead = stream->at, step = stream->step, ++stream;
      for (const int64_t stop = min64(end, k + kStreamLines); k < stop; ++k) {
        const vf b0 = loadu<vf>(b), b1 = loadu<vf>(b + W);
        __builtin_prefetch(b + kNear * NR);
        if (NR * 4 > kLine) __builtin_prefetch(b + kNear * NR + W);
        if (kAhead) __builtin_prefetch(ahead, 0, 2);
        ahead += step;
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
          const uint32_t* item = kColumns ? base[0] + r : base[r / 3] + (r % 3) * lda;
          multiply_add<C>(acc[r][0], item, b0);
          multiply_add<C>(acc[r][1], item, b1);
        }
        b += NR;
#pragma GCC unroll 8
        for (int g = 0; g < kBases; ++g) base[g] += kColumns ? lda : 1;
      }
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
