// Ampere's instructions as CUTLASS names them, and no more than the engines use. On fibers: csrc/tests/ampere.h.
#pragma once
#ifdef MOE_FIBERS
#include "../tests/ampere.h"
#else
#include "cute/arch/copy_sm75.hpp"
#include "cute/arch/copy_sm80.hpp"
#include "cute/arch/mma_sm80.hpp"
#include "device.h"

namespace moe::cuda {

// Asynchronous copy of 16 bytes into shared memory, zeros where not live.
__device__ inline void load_chunk(void* shared, const void* global, bool live) {
  using Copy = cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>;
  Copy::copy(*static_cast<const cute::uint128_t*>(global), *static_cast<cute::uint128_t*>(shared), live);
}
__device__ inline void commit_chunks() { cute::cp_async_fence(); }
// Wait until at most LEFT committed groups of this thread's copies are under way.
template <int LEFT>
__device__ void wait_chunks() {
  cute::cp_async_wait<LEFT>();
}

// Four 8 x 8 matrices of 16-bit elements, matrix i from the rows that lanes 8 i to 8 i + 7 point to. A lane gets the
// two elements 2 (lane % 4) of row lane / 4; transposed, of column lane / 4.
__device__ inline void load_matrices(unsigned (&to)[4], const void* row) {
  cute::SM75_U32x4_LDSM_N::copy(*static_cast<const cute::uint128_t*>(row), to[0], to[1], to[2], to[3]);
}
__device__ inline void load_transposed(unsigned (&to)[4], const void* row) {
  cute::SM75_U16x8_LDSM_T::copy(*static_cast<const cute::uint128_t*>(row), to[0], to[1], to[2], to[3]);
}

template <class T>
struct Mma;
template <>
struct Mma<bf16> : cute::SM80_16x8x16_F32BF16BF16F32_TN {};
template <>
struct Mma<fp16> : cute::SM80_16x8x16_F32F16F16F32_TN {};
template <>
struct Mma<float> : cute::SM80_16x8x8_F32TF32TF32F32_TN {};

// sums (16 x 8) += a (16 x 32 bytes) b (32 bytes x 8), of a warp. float has been rounded to TF32.
template <class T>
__device__ void multiply(float* sums, const unsigned (&a)[4], const unsigned* b) {
  Mma<T>::fma(sums[0], sums[1], sums[2], sums[3], a[0], a[1], a[2], a[3], b[0], b[1], sums[0], sums[1], sums[2],
              sums[3]);
}

__device__ inline unsigned round_tf32(unsigned bits) {  // to nearest: truncation would double the error
  unsigned rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

}  // namespace moe::cuda
#endif
