// What every kernel file starts from: storage types, 8-element accesses, warp reductions, checked calls and launches.
// Compiled by nvcc for a GPU and, with MOE_FIBERS, by a C++ compiler against csrc/tests/fibers.h for tests on a CPU.
#pragma once
#ifdef MOE_FIBERS
#include "../tests/fibers.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif
#include <utility>

#include "../core/dtype.h"
#include "../core/error.h"
#include "context.h"
#include "stream.h"

#define MOE_CUDA(call)                                                     \
  do {                                                                     \
    const cudaError_t code = (call);                                       \
    MOE_CHECK(code == cudaSuccess, #call, ": ", cudaGetErrorString(code)); \
  } while (0)

namespace moe::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Whether a kernel is launched with early_starts here: its image for this GPU must have wait_for_predecessor in it.
bool starts_early(const void* kernel);

// Launch `kernel` on `blocks` x `threads` with `shared` bytes of dynamic shared memory; nothing without blocks.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, int threads, size_t shared, cudaStream_t stream,
            Arguments&&... arguments) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
#ifdef MOE_FIBERS
  (void)stream, (void)early_starts();
  fibers::launch(blocks, threads, shared, [&] {
    kernel(arguments...);
    fibers::expect_waited();
  });
#else
  if (shared > 48 * 1024)
    MOE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  if (starts_early(reinterpret_cast<const void*>(kernel))) config.attrs = &early, config.numAttrs = 1;
  MOE_CUDA(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
#endif
}

// Programmatic dependent launch. A kernel that is launched so may start once every block of its predecessor in the
// stream has let it or has ended; what that wrote is there after wait_for_predecessor, which returns when the
// predecessor has ended. Therefore (CUDA's programming guide, PTX's griddepcontrol):
// - Before the wait a kernel uses parameters (tensor maps are), indices and shared memory, no global memory: it would
//   read too early, or write what is still read.
// - Every thread of every kernel waits, also one that has nothing to do. A grid ends after its threads, so that whoever
//   waits for it has waited for all before it; otherwise only neighbours would be in order.
// - No const __restrict__ parameters and no __ldg: such loads are outside of the memory model, so compilers may move
//   them before the wait, and what they hit may be older than it.
// - Everything else keeps its full order: kernels launched without (torch's) before and after, copies, memsets, events.
//   A capture turns it into a programmatic edge between two kernels, with the same meaning (from CUDA 12.3 on).
// Threads of fibers are checked (expect_waited); the machine code is, by bench static-gate.
#ifdef MOE_FIBERS
inline void wait_for_predecessor() { fibers::wait_for_predecessor(); }
inline void let_successor_start() {}
#else
__device__ inline void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// A hint, and no promise about memory. A successor gets what room all blocks of this kernel leave, never room that one
// still needs: it starts after the last block has come here.
__device__ inline void let_successor_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

// The first statement of every kernel but the products, whose blocks fill a processor: those prepare before they wait,
// and let go at the end (sm90: when all loads are issued), as a small successor would crowd onto the processors that
// are free first. Here after the wait, so that never more than two kernels are under way.
__device__ inline void take_turn() {
  wait_for_predecessor();
  let_successor_start();
}

#ifndef MOE_FIBERS
#define MOE_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) char name[]
#endif

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifdef MOE_FIBERS
template <class T>
float wide(T value) {
  return to_float(value);
}
template <class T>
T narrow(float value) {
  T out;
  assign(out, value);
  return out;
}
#else
__device__ inline float wide(float value) { return value; }
__device__ inline float wide(bf16 value) { return __uint_as_float(unsigned(value.bits) << 16); }
__device__ inline float wide(fp16 value) { return __half2float(__ushort_as_half(value.bits)); }
template <class T>
__device__ T narrow(float value);
template <>
__device__ inline float narrow<float>(float value) {
  return value;
}
template <>
__device__ inline bf16 narrow<bf16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ inline fp16 narrow<fp16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
#endif

// Eight consecutive elements, 16-byte aligned, as one access (two for float).
template <class T>
struct alignas(16) Eight {
  T at[8];
};

// The same as it was loaded. nvcc takes an Eight of 16 bits apart where it loads it, and waits for the load: what is
// asked for ahead stays in words.
template <class T>
struct __attribute__((may_alias, aligned(16))) Words8 {
  unsigned words[2 * sizeof(T)];

  __device__ float at(int i) const {
    if constexpr (sizeof(T) == 4)
      return __uint_as_float(words[i]);
    else
      return wide(T{uint16_t(words[i / 2] >> i % 2 * 16)});
  }
};

template <class T>
__device__ inline void load8(const T* from, float (&values)[8]) {
  const Eight<T> eight = *reinterpret_cast<const Eight<T>*>(from);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = wide(eight.at[i]);
}

template <class T>
__device__ inline void store8(T* to, const float (&values)[8]) {
  Eight<T> eight;
#pragma unroll
  for (int i = 0; i < 8; ++i) eight.at[i] = narrow<T>(values[i]);
  *reinterpret_cast<Eight<T>*>(to) = eight;
}

// A few floats whose dtype is chosen at run time, the same for all threads.
struct AnyFloats {
  const void* data;
  Dtype dtype;

  template <int N>
  __device__ __forceinline__ void load(int64_t at, float (&values)[N]) const {
    if (dtype == Dtype::kFloat32) load_as<float>(at, values);
    if (dtype == Dtype::kBFloat16) load_as<bf16>(at, values);
    if (dtype == Dtype::kFloat16) load_as<fp16>(at, values);
  }
  template <class T, int N>
  __device__ __forceinline__ void load_as(int64_t at, float (&values)[N]) const {
    struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Packed {
      T at[N];
    };
    const Packed packed = *reinterpret_cast<const Packed*>(static_cast<const T*>(data) + at);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = wide(packed.at[i]);
  }
};

// Sum over the lanes of a warp, the same bits in every lane.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

}  // namespace moe::cuda
