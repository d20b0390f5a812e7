// The dispatch room on a GPU: picks to a routing plan by a stable counting sort, without atomics and without the host.
#pragma once
#include "../core/shapes.h"
#include "stream.h"

namespace moe::cuda {

// As moe::dispatch_fwd (csrc/cpu/dispatch.h), but ids outside [0, E) are clamped: a GPU cannot raise.
int64_t dispatch_workspace_bytes(int64_t T, int64_t K, int64_t E);
void dispatch_fwd(int64_t T, int64_t K, int64_t E, const int32_t* topk_ids, const float* topk_weights, const PlanOut&,
                  void* workspace, cudaStream_t);

// out (count,) = 0, then out[row_pick[r]] = drow_weight[r]; a pick has at most one row.
void dispatch_bwd(int64_t R, int64_t count, const float* drow_weight, const int32_t* row_pick, float* out,
                  cudaStream_t);

}  // namespace moe::cuda
