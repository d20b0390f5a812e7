// Token choice and the experts behind it, one call a direction: the rooms one after the other, on memory carved here.
// Host code only: whatever includes this launches what the rooms launch.
#pragma once
#include <array>

#include "dispatch.h"
#include "experts.h"
#include "gating.h"
#include "scratch.h"

namespace moe::cuda {

struct TokenChoiceSizes {
  GatingSizes gating;
  MoeSizes experts;  // R = T K
  Dtype gate_dtype;  // of gate_weight and its gradient
};

// Where in one memory lies what backward reads of forward: the plan's fields in their order, topk_ids, probs,
// gate_up, shared_gate_up and the router's weight in fp32; empty are those two where backward computes them again, and
// the weight where it is so already.
class Kept {
 public:
  enum Piece { kTopkIds = 7, kProbs, kGateUp, kSharedGateUp, kGateWeight, kPieces };

  Kept(const TokenChoiceSizes& sizes, bool gate_up) : has_gate_up_(gate_up) {
    const MoeSizes& s = sizes.experts;
    const int64_t wide = gate_up ? s.halves() * dtype_bytes(s.dtype) : 0;
    const int64_t gate = sizes.gate_dtype == Dtype::kFloat32 ? 0 : 4 * s.E * s.H;
    const int64_t bytes[kPieces] = {
        4 * s.R,       4 * s.E,          4 * (s.E + 1),     4 * s.R,
        4 * s.R,       4 * (s.T + 1),    4 * s.R,           4 * sizes.gating.T * sizes.gating.K,
        4 * s.T * s.E, wide * s.R * s.I, wide * s.T * s.Is, gate};
    Scratch counting;
    for (int i = 0; i < kPieces; ++i) offsets_[i] = counting.bytes(), counting.take_bytes(bytes[i]);
    bytes_ = counting.bytes();
  }

  int64_t bytes() const { return bytes_; }
  const std::array<int64_t, kPieces>& offsets() const { return offsets_; }

  template <class T>
  T* at(void* memory, int piece) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory) + offsets_[piece]);
  }
  void* gate_up(void* memory) const { return has_gate_up_ ? at<void>(memory, kGateUp) : nullptr; }
  void* shared_gate_up(void* memory) const { return has_gate_up_ ? at<void>(memory, kSharedGateUp) : nullptr; }
  PlanOut plan(void* memory) const {
    const auto integers = [&](int field) { return at<int32_t>(memory, field); };
    return {at<float>(memory, 0), integers(1), integers(2), integers(3), integers(4), integers(5), integers(6)};
  }

 private:
  std::array<int64_t, kPieces> offsets_;
  int64_t bytes_;
  bool has_gate_up_;
};

inline PlanView view_of(const PlanOut& p) {
  return {p.row_weight, p.expert_offsets, p.row_token, p.token_row_offsets, p.token_rows};
}

inline const float* wide_gate(const TokenChoiceSizes& sizes, const void* gate_weight, const Kept& kept, void* memory) {
  if (sizes.gate_dtype == Dtype::kFloat32) return static_cast<const float*>(gate_weight);
  return kept.at<float>(memory, Kept::kGateWeight);
}

struct TokenChoiceForward {
  float* topk_weights;
  void* dispatch;
  void* experts;
};
inline TokenChoiceForward take_forward(Scratch& scratch, const TokenChoiceSizes& sizes) {
  const GatingSizes& g = sizes.gating;
  return {scratch.take<float>(g.T * g.K), scratch.take_bytes(dispatch_workspace_bytes(g.T, g.K, g.E)),
          scratch.take_bytes(moe_mlp_fwd_workspace_bytes(sizes.experts))};
}

inline void token_choice_fwd(const TokenChoiceSizes& sizes, const ExpertWeights& w, const void* x,
                             const void* gate_weight, void* out, const Kept& kept, void* memory,
                             const TokenChoiceForward& f, cudaStream_t stream) {
  const GatingSizes& g = sizes.gating;
  const PlanOut plan = kept.plan(memory);
  int32_t* topk_ids = kept.at<int32_t>(memory, Kept::kTopkIds);
  const float* router = wide_gate(sizes, gate_weight, kept, memory);
  if (router != gate_weight)
    widen_weight(sizes.gate_dtype, g.E * g.H, gate_weight, kept.at<float>(memory, Kept::kGateWeight), stream);
  gating_fwd(g, x, router, kept.at<float>(memory, Kept::kProbs), f.topk_weights, topk_ids, stream);
  dispatch_fwd(g.T, g.K, g.E, topk_ids, f.topk_weights, plan, f.dispatch, stream);
  moe_mlp_fwd(sizes.experts, view_of(plan), w, x, out, kept.gate_up(memory), kept.shared_gate_up(memory), nullptr,
              f.experts, stream);
}

struct TokenChoiceBackward {
  float* dtopk_weights;
  void* experts;
  void* gating;
};
inline TokenChoiceBackward take_backward(Scratch& scratch, const TokenChoiceSizes& sizes, bool recompute) {
  const MoeSizes& s = sizes.experts;
  return {scratch.take<float>(s.R), scratch.take_bytes(moe_mlp_bwd_workspace_bytes(s, recompute)),
          scratch.take_bytes(gating_bwd_workspace_bytes(sizes.gating))};
}

// dx and the weights' gradients; without dgate_weight only what goes through the experts.
struct TokenChoiceGrads {
  void* dx;
  ExpertGrads experts;
  void* dgate_weight;
};
// aux_scale: of the experts' counts in the gradient of probs (RouterUpstream).
inline void token_choice_bwd(const TokenChoiceSizes& sizes, const ExpertWeights& w, const void* x, const void* dout,
                             const void* gate_weight, float aux_scale, const Kept& kept, void* memory,
                             const TokenChoiceGrads& grads, const TokenChoiceBackward& b, cudaStream_t stream) {
  const MoeSizes& s = sizes.experts;
  const PlanOut plan = kept.plan(memory);
  moe_mlp_bwd(s, view_of(plan), w, x, dout, kept.gate_up(memory), kept.shared_gate_up(memory), grads.dx,
              b.dtopk_weights, plan.row_pick, grads.experts, b.experts, stream);
  if (!grads.dgate_weight) return;
  const RouterUpstream upstream{b.dtopk_weights, {}, plan.expert_counts, aux_scale};
  gating_bwd(sizes.gating, upstream, x, wide_gate(sizes, gate_weight, kept, memory),
             kept.at<int32_t>(memory, Kept::kTopkIds), kept.at<float>(memory, Kept::kProbs),
             {grads.dx, true, grads.dgate_weight, sizes.gate_dtype}, b.gating, stream);
}

}  // namespace moe::cuda
