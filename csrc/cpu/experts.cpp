#include "experts.h"

#include "combine.h"
#include "experts_tasks.h"

namespace moe {
namespace {

CombineArgs combine_args(const MoeSizes& s, const PlanView& plan, const float* y, bool weighted, void* out) {
  return {s.T,
          s.H,
          Dtype::kFloat32,
          s.dtype,
          s.threads,
          y,
          weighted ? plan.row_weight : nullptr,
          plan.token_row_offsets,
          plan.token_rows,
          s.Is > 0 ? y + s.R * s.H : nullptr,
          out};
}

}  // namespace

void moe_mlp_fwd(const MoeSizes& s, const PlanView& plan, const ExpertTable& w, const PackedWeights* packed,
                 const void* x, void* out, void* gate_up, void* shared_gate_up) {
  if (packed) packed->check(s, w);
  Engine engine(s);
  engine.forward(engine.groups(plan, w, gate_up, shared_gate_up, {}, true, packed), x);
  combine_rows(combine_args(s, plan, engine.y(), true, out));
}

void moe_mlp_bwd(const MoeSizes& s, const PlanView& plan, const ExpertTable& w, const void* x, const void* dout,
                 const void* gate_up, const void* shared_gate_up, void* dx, float* drow_weight,
                 const ExpertTable& grads) {
  Engine engine(s);
  engine.backward(engine.groups(plan, w, const_cast<void*>(gate_up), const_cast<void*>(shared_gate_up), grads, true), x,
                  dout, false, plan, drow_weight);
  combine_rows(combine_args(s, plan, engine.y(), false, dx));
}

void experts_fwd(const MoeSizes& s, const PlanView& plan, const ExpertTable& w, const void* x, void* y_rows,
                 void* gate_up) {
  Engine engine(s);
  engine.forward(engine.groups(plan, w, gate_up, nullptr, {}, false), x);
  round_rows(engine.y(), y_rows, s.R * s.H, s.dtype, s.threads);
}

void experts_bwd(const MoeSizes& s, const PlanView& plan, const ExpertTable& w, const void* x, const void* dy_rows,
                 const void* gate_up, void* dx, const ExpertTable& grads) {
  Engine engine(s);
  engine.backward(engine.groups(plan, w, const_cast<void*>(gate_up), nullptr, grads, false), x, dy_rows, true, plan,
                  nullptr);
  combine_rows(combine_args(s, plan, engine.y(), false, dx));
}

}  // namespace moe
