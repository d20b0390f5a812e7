// The dispatch room: picks to a routing plan, by a stable counting sort.
#pragma once
#include "../core/shapes.h"

namespace moe {

// Token choice: rows grouped by expert, ascending (token, pick) inside an expert; R = T K.
// Throws when an id is outside [0, E).
void dispatch_fwd(int64_t T, int64_t K, int64_t E, const int32_t* topk_ids, const float* topk_weights, const PlanOut&);

// Expert choice: in every group of tokens_per_group tokens each expert takes its `capacity` highest affinities
// (the lower token on a tie), rows in ascending token order; R = E T / tokens_per_group * capacity.
void dispatch_expert_choice_fwd(int64_t T, int64_t E, int64_t capacity, int64_t tokens_per_group,
                                const float* affinities, int threads, const PlanOut&);

// Any rule: a row for each marked (t, e), at most R; rows behind them have weight 0, token 0, pick T E and are their
// own token_rows. Throws where more are marked.
void dispatch_mask_fwd(int64_t T, int64_t E, int64_t R, const float* weights, const uint8_t* picks, const PlanOut&);

}  // namespace moe
