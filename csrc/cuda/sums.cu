#include "sums.h"

#include "device.h"

namespace moe::cuda {
namespace {

constexpr int kThreads = 256, kRuns = kThreads / kWarp, kColumns = 4;

struct alignas(16) Columns {
  float at[kColumns];
};

struct Jobs {
  SumJob at[kSumJobs];
  int64_t first_block[kSumJobs + 1];
};

__host__ __device__ inline bool many(const SumJob& job) { return job.count > kRuns; }

__device__ void store_as(const SumJob& job, int64_t i, float value) {
  if (job.dtype == Dtype::kFloat32) static_cast<float*>(job.out)[i] = value;
  if (job.dtype == Dtype::kBFloat16) static_cast<bf16*>(job.out)[i] = narrow<bf16>(value);
  if (job.dtype == Dtype::kFloat16) static_cast<fp16*>(job.out)[i] = narrow<fp16>(value);
}

// partials[begin, i] + ... + partials[end - 1, i]
__device__ float sum_run(const SumJob& job, int64_t begin, int64_t end, int64_t i) {
  float total = 0;
#pragma unroll 8
  for (int64_t part = begin; part < end; ++part) total += job.partials[part * job.n + i];
  return total;
}

// Few partials: a thread adds four columns.
__device__ void sum_columns(const SumJob& job, int64_t block) {
  const int64_t i = kColumns * (block * kThreads + threadIdx.x);
  const bool aligned = job.n % kColumns == 0 && reinterpret_cast<uintptr_t>(job.partials) % 16 == 0;
  if (!aligned)
    for (int64_t c = i; c < min(i + kColumns, job.n); ++c) store_as(job, c, sum_run(job, 0, job.count, c));
  if (!aligned || i >= job.n) return;
  float total[kColumns] = {};
#pragma unroll 4
  for (int64_t part = 0; part < job.count; ++part) {
    const Columns four = *reinterpret_cast<const Columns*>(job.partials + part * job.n + i);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) total[c] += four.at[c];
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) store_as(job, i + c, total[c]);
}

// Many: a block adds 32 columns, a warp each of eight runs, then the runs.
__device__ void sum_runs(const SumJob& job, int64_t block, float* runs) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t i = block * kWarp + lane;
  const int64_t begin = job.count * warp / kRuns, end = job.count * (warp + 1) / kRuns;
  runs[threadIdx.x] = i < job.n ? sum_run(job, begin, end, i) : 0;
  __syncthreads();
  if (warp > 0 || i >= job.n) return;
  float total = 0;
  for (int run = 0; run < kRuns; ++run) total += runs[run * kWarp + lane];
  store_as(job, i, total);
}

// Grid: the blocks of the first job, then those of the second, ...
__global__ void __launch_bounds__(kThreads) sums_fwd_ordered(Jobs jobs) {
  take_turn();
  MOE_DYNAMIC_SHARED(memory);
  int mine = 0;
  while (int64_t(blockIdx.x) >= jobs.first_block[mine + 1]) ++mine;
  const SumJob job = jobs.at[mine];
  const int64_t block = int64_t(blockIdx.x) - jobs.first_block[mine];
  if (many(job))
    sum_runs(job, block, reinterpret_cast<float*>(memory));
  else
    sum_columns(job, block);
}

}  // namespace

void ordered_sums(const SumJob* jobs, int count, cudaStream_t stream) {
  MOE_CHECK(count <= kSumJobs, "ordered_sums: ", count, " jobs, expected at most ", kSumJobs);
  Jobs all{};
  for (int i = 0; i < kSumJobs; ++i) {
    if (i < count) all.at[i] = jobs[i];
    const int64_t columns = many(all.at[i]) ? kWarp : kThreads * kColumns;
    all.first_block[i + 1] = all.first_block[i] + ceil_div(all.at[i].n, columns);
  }
  launch(sums_fwd_ordered, dim3(unsigned(all.first_block[kSumJobs])), kThreads, kThreads * sizeof(float), stream, all);
}

void ordered_sum(const float* partials, int64_t count, int64_t n, void* out, Dtype dtype, cudaStream_t stream) {
  const SumJob job{partials, count, n, out, dtype};
  ordered_sums(&job, 1, stream);
}

}  // namespace moe::cuda
