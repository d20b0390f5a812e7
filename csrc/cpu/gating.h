// The gating room: router logits, softmax over all experts, top-k; everything in fp32.
#pragma once
#include <cstdint>

#include "../core/shapes.h"

namespace moe {

// probs (T, E) = softmax(x weight^T); topk: the K largest in descending order, the lower expert index on a tie.
// Returns the first token whose logits are not finite, or -1.
int64_t gating_fwd(const GatingSizes&, const void* x, const float* weight, float* probs, float* topk_weights,
                   int32_t* topk_ids);

// dlogits = probs * (g - sum(probs * g)), g = dprobs + dtopk_weights at the picks; dx = dlogits weight,
// dweight (E, H) = dlogits^T x.
void gating_bwd(const GatingSizes&, const float* dtopk_weights, const DProbs& dprobs, const void* x,
                const float* weight, const int32_t* topk_ids, const float* probs, void* dx, float* dweight);

}  // namespace moe
