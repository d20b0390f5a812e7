// The experts room: grouped expert MLP over a routing plan, forward and backward, and the fused layer around it.
#pragma once
#include <cstdint>
#include <vector>

#include "../core/shapes.h"
#include "../core/workspace.h"
#include "kernels.h"
#include "matrices.h"

namespace moe {

// Weights in the panels that the forward kernels multiply with: a second copy, made once, for inference.
class PackedWeights {
 public:
  PackedWeights(const MoeSizes&, const ExpertTable& weights);
  // Throws unless made for these sizes and, as far as one value of each matrix tells, of these weights as they are now,
  // wherever and however they are stored.
  void check(const MoeSizes&, const ExpertTable& weights) const;
  const char* expert(int64_t e) const { return memory_.data() + e * expert_bytes_; }  // e = E: the shared expert
  int64_t bytes() const { return memory_.bytes(); }

 private:
  MoeSizes sizes_;
  Block memory_;
  int64_t expert_bytes_;
  std::vector<uint16_t> samples_;
};

// y_rows (R, H): each routed row through its expert, unweighted. gate_up (R, halves * I) is kept when not null.
void experts_fwd(const MoeSizes&, const PlanView&, const ExpertTable& weights, const void* x, void* y_rows,
                 void* gate_up);

// Gradients of experts_fwd from dy_rows (R, H): dx (T, H) and the weight gradients that `grads` has room for.
void experts_bwd(const MoeSizes&, const PlanView&, const ExpertTable& weights, const void* x, const void* dy_rows,
                 const void* gate_up, void* dx, const ExpertTable& grads);

// out (T, H) = shared(x) + sum of row_weight * expert(x), accumulated in fp32 and rounded once.
// `packed`, where not null, is made of these weights.
void moe_mlp_fwd(const MoeSizes&, const PlanView&, const ExpertTable& weights, const PackedWeights* packed,
                 const void* x, void* out, void* gate_up, void* shared_gate_up);

// Gradients of moe_mlp_fwd: dx (T, H), drow_weight (R,), and the weight gradients that `grads` has room for (exact
// zeros for experts without rows). gate_up and shared_gate_up, where null, are computed again.
void moe_mlp_bwd(const MoeSizes&, const PlanView&, const ExpertTable& weights, const void* x, const void* dout,
                 const void* gate_up, const void* shared_gate_up, void* dx, float* drow_weight,
                 const ExpertTable& grads);

}  // namespace moe
