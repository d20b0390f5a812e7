// Hopper's instructions as CUTLASS names them, and no more than engine_sm90.h uses. On fibers: csrc/tests/hopper.h.
#pragma once
#ifdef MOE_FIBERS
#include "../tests/hopper.h"
#else
#include <cuda.h>

#include <utility>

#include "ampere.h"
#include "cute/arch/copy_sm90_tma.hpp"
#include "cute/arch/mma_sm90_gmma.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/arch/reg_reconfig.h"
#include "device.h"
#include "products.h"

namespace moe::cuda::hopper {

using TensorMap = CUtensorMap;

// CUTLASS' barriers and proxy fences do not say that they touch memory: without this a compiler may move plain accesses
// of shared memory across them.
__device__ inline void keep_accesses() { asm volatile("" ::: "memory"); }

// A barrier in shared memory: a phase ends when all arrivals and all announced bytes have come.
struct Barrier {
  uint64_t state;
};

__device__ inline void init(Barrier& barrier, int arrivals) {
  cutlass::arch::ClusterBarrier::init(&barrier.state, arrivals);
}
__device__ inline void make_barriers_visible() { cutlass::arch::fence_barrier_init(); }
__device__ inline void arrive(Barrier& barrier) {
  keep_accesses();
  cutlass::arch::ClusterBarrier::arrive(&barrier.state);
}
__device__ inline void arrive_announcing(Barrier& barrier, int bytes) {
  cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&barrier.state, bytes);
}
// Wait until the phase of this parity has ended.
__device__ inline void wait(Barrier& barrier, int parity) {
  cutlass::arch::ClusterBarrier::wait(&barrier.state, parity);
  keep_accesses();
}

// TMA: a box at these coordinates, innermost first, into swizzled lines; zeros outside of the tensor.
__device__ inline void load_box(const TensorMap& map, Barrier& barrier, void* shared, int c0, int c1, int c2, int c3) {
  cute::SM90_TMA_LOAD_4D::copy(&map, &barrier.state, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                               shared, c0, c1, c2, c3);
}

// One arrival when all of this thread's load_chunk (ampere.h) have landed.
__device__ inline void arrive_after_chunks(Barrier& barrier) {
  cutlass::arch::cpasync_barrier_arrive_noinc(&barrier.state);
}
// Plain and cp.async writes before this are seen by the tensor cores after it.
__device__ inline void make_visible() {
  keep_accesses();
  cutlass::arch::fence_view_async_shared();
  keep_accesses();
}

__device__ inline void sync_threads(int id, int threads) {
  keep_accesses();
  cutlass::arch::NamedBarrier::sync(threads, id);
  keep_accesses();
}
__device__ inline void arrive_threads(int id, int threads) {
  keep_accesses();
  cutlass::arch::NamedBarrier::arrive(threads, id);
}

template <int REGISTERS>
__device__ void release_registers() {
  cutlass::arch::warpgroup_reg_dealloc<REGISTERS>();
}
template <int REGISTERS>
__device__ void acquire_registers() {
  cutlass::arch::warpgroup_reg_alloc<REGISTERS>();
}

__device__ inline uint64_t shared_address(const void* shared) { return cute::cast_smem_ptr_to_uint(shared); }

template <class T, int N, cute::SM90::GMMA::Major A, cute::SM90::GMMA::Major B>
struct Wgmma;
#define MOE_WGMMA(T, N, NAME)                                     \
  template <cute::SM90::GMMA::Major A, cute::SM90::GMMA::Major B> \
  struct Wgmma<T, N, A, B> : cute::SM90::GMMA::MMA_64x##N##x16_F32##NAME##_SS<A, B> {};
MOE_WGMMA(bf16, 128, BF16BF16)
MOE_WGMMA(bf16, 192, BF16BF16)
MOE_WGMMA(bf16, 256, BF16BF16)
MOE_WGMMA(fp16, 128, F16F16)
MOE_WGMMA(fp16, 192, F16F16)
MOE_WGMMA(fp16, 256, F16F16)
#undef MOE_WGMMA

template <class Instruction, int COUNT, size_t... INDEX>
__device__ void call(float (&sums)[COUNT], uint64_t a, uint64_t b, std::index_sequence<INDEX...>) {
  Instruction::fma(a, b, sums[INDEX]...);
}

// sums (64 x N of the warpgroup) += a (64 x 16) b (16 x N), asynchronously, between start() and commit().
template <class T, int N, Summed A, Summed B>
__device__ void multiply(float (&sums)[N / 2], uint64_t a, uint64_t b) {
  constexpr auto K = cute::SM90::GMMA::Major::K, MN = cute::SM90::GMMA::Major::MN;
  using Instruction = Wgmma<T, N, A == Summed::kInner ? K : MN, B == Summed::kInner ? K : MN>;
  call<Instruction>(sums, a, b, std::make_index_sequence<N / 2>{});
}
template <int COUNT>
__device__ void keep_order(float (&sums)[COUNT]) {  // the compiler must not move accesses to sums across
#pragma unroll
  for (int i = 0; i < COUNT; ++i) cute::warpgroup_fence_operand(sums[i]);
}
__device__ inline void start() { cute::warpgroup_arrive(); }
__device__ inline void commit() { cute::warpgroup_commit_batch(); }
// Wait until at most LEFT committed batches are still at work.
template <int LEFT>
__device__ void wait_products() {
  cute::warpgroup_wait<LEFT>();
}

// A row-major tensor of up to four dimensions, innermost first, and the box that load_box takes out of it.
TensorMap tensor_map(Dtype, const void* data, const int64_t (&sizes)[4], const int64_t (&strides)[4],
                     const int (&box)[4]);

}  // namespace moe::cuda::hopper
#endif
