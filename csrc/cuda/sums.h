// Sums of partial results in a fixed order: the same bits every time.
#pragma once
#include "../core/shapes.h"
#include "stream.h"

namespace moe::cuda {

// out[i] = partials[0, i] + partials[1, i] + ...; partials fp32 (count, n), out (n,) of dtype. From nine partials on
// they are added in eight runs of consecutive ones, and the runs' sums in order.
void ordered_sum(const float* partials, int64_t count, int64_t n, void* out, Dtype dtype, cudaStream_t);

// Up to four such sums in one launch.
struct SumJob {
  const float* partials;
  int64_t count, n;
  void* out;
  Dtype dtype;
};
constexpr int kSumJobs = 4;
void ordered_sums(const SumJob* jobs, int count, cudaStream_t);

}  // namespace moe::cuda
