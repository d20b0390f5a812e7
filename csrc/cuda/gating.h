// The gating room on a GPU: router logits, softmax over all experts, top-k; everything in fp32. And adaLN around it.
#pragma once
#include "../core/shapes.h"
#include "stream.h"

namespace moe::cuda {

// As moe::gating_fwd (csrc/cpu/gating.h), but logits that are not finite give NaN: a GPU cannot raise.
void gating_fwd(const GatingSizes&, const void* x, const float* weight, float* probs, float* topk_weights,
                int32_t* topk_ids, cudaStream_t);

// A router's weight as its kernels read it, fp32: out (n,) of `weight` (n,), in a 16-bit dtype.
void widen_weight(Dtype, int64_t n, const void* weight, float* out, cudaStream_t);

// What reaches a router from behind: gradients of topk_weights (T, K) and of probs, null where there are none; and in
// place of dprobs that of the auxiliary loss, scale expert_counts[e] for every token.
struct RouterUpstream {
  const float* dtopk_weights;
  DProbs dprobs;
  const int32_t* expert_counts = nullptr;
  float scale = 0;
};

// Where the gradients go. dx is rounded to its dtype, and with `add` added to what is there.
struct RouterGrads {
  void* dx;
  bool add;
  void* dweight;
  Dtype dweight_dtype;
};

// As moe::gating_bwd. The workspace holds partial sums over blocks of tokens, which are added in order.
int64_t gating_bwd_workspace_bytes(const GatingSizes&);
void gating_bwd(const GatingSizes&, const RouterUpstream&, const void* x, const float* weight, const int32_t* topk_ids,
                const float* probs, const RouterGrads&, void* workspace, cudaStream_t);

// adaLN: x (B, L, H), shift and scale (B, H), each of its own dtype; tokens (T, H) of GatingSizes::dtype; T = B L.
struct Modulation {
  int64_t B;
  Dtype x_dtype, shift_dtype, scale_dtype;
  float eps;
  const void* x;
  const void* shift;
  const void* scale;
};

// tokens = LayerNorm(x) (1 + scale_b) + shift_b, rounded; then gating_fwd of them. moments (2, T): mean and reciprocal
// deviation of each token, fp32.
void modulated_gating_fwd(const GatingSizes&, const Modulation&, const float* weight, void* tokens, float* probs,
                          float* topk_weights, int32_t* topk_ids, float* moments, cudaStream_t);

// Gradients: dx (B, L, H), dshift and dscale (B, H) of the dtypes of x, shift and scale, dweight (E, H) fp32. dtokens
// (T, H) of GatingSizes::dtype and dtopk_weights may each be null. Sums over tokens are ordered.
int64_t modulated_gating_bwd_workspace_bytes(const GatingSizes&, const Modulation&);
void modulated_gating_bwd(const GatingSizes&, const Modulation&, const void* dtokens, const float* dtopk_weights,
                          const DProbs& dprobs, const float* weight, const int32_t* topk_ids, const float* probs,
                          const float* moments, void* dx, void* dshift, void* dscale, float* dweight, void* workspace,
                          cudaStream_t);

}  // namespace moe::cuda
