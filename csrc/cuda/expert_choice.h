// The dispatch room on a GPU where experts choose: affinities to a routing plan by a selection bit by bit, without
// sorting, without atomics and without the host.
#pragma once
#include "../core/shapes.h"
#include "stream.h"

namespace moe::cuda {

// As moe::dispatch_expert_choice_fwd (csrc/cpu/dispatch.h); NaN, which a GPU cannot refuse, is the largest affinity.
// tokens_per_group divides T; T E and the rows are less than 2^31.
int64_t dispatch_expert_choice_workspace_bytes(int64_t T, int64_t E);
void dispatch_expert_choice_fwd(int64_t T, int64_t E, int64_t capacity, int64_t tokens_per_group,
                                const float* affinities, const PlanOut&, void* workspace, cudaStream_t);

}  // namespace moe::cuda
