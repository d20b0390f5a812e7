// Selection on a GPU, by rules that need a pass over all scores, and the plan of what they pick: without sorting,
// without atomics and without the host.
#pragma once
#include "../core/shapes.h"
#include "stream.h"

namespace moe::cuda {

// As moe::select_top (csrc/cpu/selection.h); G N columns of M scores, G M N and G N M / 256 less than 2^31.
int64_t select_top_workspace_bytes(int64_t G, int64_t M, int64_t N);
void select_top(int64_t G, int64_t M, int64_t N, const float* scores, const int32_t* counts, int64_t count,
                uint8_t* picks, float* least, void* workspace, cudaStream_t);

// As moe::select_experts; T E less than 2^31.
void select_experts(int64_t T, int64_t E, int64_t K, int64_t groups, int64_t groups_taken, const float* scores,
                    int32_t* ids, cudaStream_t);

// As moe::dispatch_mask_fwd (csrc/cpu/dispatch.h), but rows from R on, which a GPU cannot refuse, are dropped: the last
// experts' last tokens. T E less than 2^31.
int64_t dispatch_mask_workspace_bytes(int64_t T, int64_t E);
void dispatch_mask_fwd(int64_t T, int64_t E, int64_t R, const float* weights, const uint8_t* picks, const PlanOut&,
                       void* workspace, cudaStream_t);

}  // namespace moe::cuda
