// The CUDA backend's Python module: every buffer checked as in bindings.cpp, except for contents, which are on a GPU.
// Kernels go to the caller's stream on the device of use_device, with the caller's scratch memory (*_workspace_bytes).
#include "bindings_cuda.h"
#include "bindings_token_choice.h"

#include "cuda/combine.h"
#include "cuda/context.h"
#include "cuda/dispatch.h"
#include "cuda/expert_choice.h"
#include "cuda/experts.h"
#include "cuda/gating.h"
#include "cuda/selection.h"
#ifdef MOE_FIBERS
#include "tests/fibers.h"
#endif

namespace py = pybind11;
using namespace moe;

namespace {

void expect_picks(const GatingSizes& s, const Tensor& topk_weights, const Tensor& topk_ids) {
  topk_weights.expect("topk_weights", F32, {s.T, s.K});
  topk_ids.expect("topk_ids", I32, {s.T, s.K});
}

void py_gating_fwd(const Tensor& x, const Tensor& weight, const Tensor& probs, const Tensor& topk_weights,
                   const Tensor& topk_ids, uintptr_t stream) {
  const GatingSizes s = gating_sizes(x, weight, topk_ids.sizes.at(1));
  probs.expect("probs", F32, {s.T, s.E});
  expect_picks(s, topk_weights, topk_ids);
  cuda::gating_fwd(s, x.data, weight.as<float>(), probs.as<float>(), topk_weights.as<float>(), topk_ids.as<int32_t>(),
                   stream_of(stream));
}

int64_t py_gating_bwd_workspace_bytes(int64_t T, int64_t H, int64_t E, int64_t K) {
  return cuda::gating_bwd_workspace_bytes({T, H, E, K, F32, 1});
}

void py_gating_bwd(const Maybe& dtopk_weights, const Maybe& dprobs, const Tensor& x, const Tensor& weight,
                   const Tensor& topk_ids, const Tensor& probs, const Tensor& dx, const Tensor& dweight,
                   const Tensor& workspace, uintptr_t stream) {
  const GatingSizes s = gating_sizes(x, weight, topk_ids.sizes.at(1));
  probs.expect("probs", F32, {s.T, s.E});
  if (dtopk_weights) expect_picks(s, *dtopk_weights, topk_ids);
  dx.expect("dx", x.dtype, {s.T, s.H});
  dweight.expect("dgate_weight", F32, {s.E, s.H});
  cuda::gating_bwd(s, {optional(dtopk_weights).as<float>(), dprobs_of(dprobs, s)}, x.data, weight.as<float>(),
                   topk_ids.as<int32_t>(), probs.as<float>(), {dx.data, false, dweight.data, F32},
                   scratch_of(workspace, cuda::gating_bwd_workspace_bytes(s)), stream_of(stream));
}

cuda::Modulation modulation_of(const Tensor& x, const Tensor& shift, const Tensor& scale, float eps) {
  expect_float("x", x);
  MOE_CHECK(x.sizes.size() == 3, "x: ", x.sizes.size(), " dimensions, expected 3");
  const int64_t B = x.sizes[0], H = x.sizes[2];
  x.expect("x", x.dtype, {B, -1, H});
  expect_float("shift", shift);
  expect_float("scale", scale);
  shift.expect("shift", shift.dtype, {B, H});
  scale.expect("scale", scale.dtype, {B, H});
  for (const Tensor* t : {&x, &shift, &scale}) expect_aligned("x, shift, scale", *t);
  return {B, x.dtype, shift.dtype, scale.dtype, eps, x.data, shift.data, scale.data};
}

void py_modulated_gating_fwd(const Tensor& x, const Tensor& shift, const Tensor& scale, const Tensor& weight, float eps,
                             const Tensor& tokens, const Tensor& probs, const Tensor& topk_weights,
                             const Tensor& topk_ids, const Tensor& moments, uintptr_t stream) {
  const cuda::Modulation modulation = modulation_of(x, shift, scale, eps);
  const GatingSizes s = gating_sizes(tokens, weight, topk_ids.sizes.at(1));
  probs.expect("probs", F32, {s.T, s.E});
  MOE_CHECK(x.sizes[0] * x.sizes[1] == s.T && x.sizes[2] == s.H, "x: ", x.sizes[0], " x ", x.sizes[1],
            " tokens, expected ", s.T);
  expect_picks(s, topk_weights, topk_ids);
  moments.expect("moments", F32, {2, s.T});
  cuda::modulated_gating_fwd(s, modulation, weight.as<float>(), tokens.data, probs.as<float>(),
                             topk_weights.as<float>(), topk_ids.as<int32_t>(), moments.as<float>(), stream_of(stream));
}

int64_t py_modulated_gating_bwd_workspace_bytes(int64_t B, int64_t T, int64_t H, int64_t E, int64_t K) {
  return cuda::modulated_gating_bwd_workspace_bytes({T, H, E, K, F32, 1},
                                                    {B, F32, F32, F32, 0, nullptr, nullptr, nullptr});
}

void py_modulated_gating_bwd(const Maybe& dtokens, const Maybe& dtopk_weights, const Maybe& dprobs, const Tensor& x,
                             const Tensor& shift, const Tensor& scale, const Tensor& weight, const Tensor& topk_ids,
                             const Tensor& probs, const Tensor& moments, int tokens_dtype, const Tensor& dx,
                             const Tensor& dshift, const Tensor& dscale, const Tensor& dweight, const Tensor& workspace,
                             uintptr_t stream) {
  const cuda::Modulation modulation = modulation_of(x, shift, scale, 0);
  const GatingSizes s{x.sizes[0] * x.sizes[1], x.sizes[2],          weight.sizes.at(0),
                      topk_ids.sizes.at(1),    Dtype(tokens_dtype), 1};
  expect_width("x", s.H);
  weight.expect("gate_weight", F32, {s.E, s.H});
  probs.expect("probs", F32, {s.T, s.E});
  if (dtokens) dtokens->expect("dtokens", s.dtype, {s.T, s.H});
  if (dtopk_weights) expect_picks(s, *dtopk_weights, topk_ids);
  moments.expect("moments", F32, {2, s.T});
  dx.expect("dx", x.dtype, x.sizes);
  dshift.expect("dshift", shift.dtype, shift.sizes);
  dscale.expect("dscale", scale.dtype, scale.sizes);
  dweight.expect("dgate_weight", F32, {s.E, s.H});
  cuda::modulated_gating_bwd(s, modulation, optional(dtokens).data, optional(dtopk_weights).as<float>(),
                             dprobs_of(dprobs, s), weight.as<float>(), topk_ids.as<int32_t>(), probs.as<float>(),
                             moments.as<float>(), dx.data, dshift.data, dscale.data, dweight.as<float>(),
                             scratch_of(workspace, cuda::modulated_gating_bwd_workspace_bytes(s, modulation)),
                             stream_of(stream));
}

void py_dispatch(const Tensor& topk_ids, const Tensor& topk_weights, int64_t num_experts, const Plan& plan,
                 const Tensor& workspace, uintptr_t stream) {
  const int64_t T = topk_ids.sizes.at(0), K = topk_ids.sizes.at(1);
  topk_ids.expect("topk_ids", I32, {T, K});
  topk_weights.expect("topk_weights", F32, {T, K});
  cuda::dispatch_fwd(T, K, num_experts, topk_ids.as<int32_t>(), topk_weights.as<float>(),
                     out_of(plan, T, num_experts, T * K),
                     scratch_of(workspace, cuda::dispatch_workspace_bytes(T, K, num_experts)), stream_of(stream));
}

void py_dispatch_expert_choice(const Tensor& affinities, int64_t capacity, int64_t tokens_per_group, const Plan& plan,
                               const Tensor& workspace, uintptr_t stream) {
  const int64_t T = affinities.sizes.at(0), E = affinities.sizes.at(1);
  affinities.expect("affinities", F32, {T, E});
  MOE_CHECK(T * E < (int64_t(1) << 31), "affinities: ", T * E, " elements, expected less than 2^31");
  MOE_CHECK(tokens_per_group > 0 && T % tokens_per_group == 0, "tokens_per_group: ", tokens_per_group,
            ", expected a divisor of ", T, " tokens");
  MOE_CHECK(capacity > 0 && capacity <= tokens_per_group, "capacity: ", capacity, ", expected 1..", tokens_per_group);
  cuda::dispatch_expert_choice_fwd(T, E, capacity, tokens_per_group, affinities.as<float>(),
                                   out_of(plan, T, E, E * (T / tokens_per_group) * capacity),
                                   scratch_of(workspace, cuda::dispatch_expert_choice_workspace_bytes(T, E)),
                                   stream_of(stream));
}

void py_dispatch_mask(const Tensor& weights, const Tensor& picks, const Plan& plan, const Tensor& workspace,
                      uintptr_t stream) {
  const int64_t T = weights.sizes.at(0), E = weights.sizes.at(1);
  weights.expect("weights", F32, {T, E});
  picks.expect("picks", Dtype::kBool, {T, E});
  expect_fields(plan);
  MOE_CHECK(T * E < (int64_t(1) << 31), "weights: ", T * E, " elements, expected less than 2^31");
  const int64_t R = plan[kRowToken].sizes.at(0);
  cuda::dispatch_mask_fwd(T, E, R, weights.as<float>(), picks.as<uint8_t>(), out_of(plan, T, E, R),
                          scratch_of(workspace, cuda::dispatch_mask_workspace_bytes(T, E)), stream_of(stream));
}

void py_select_top(const Tensor& scores, const std::optional<Tensor>& counts, int64_t count, const Tensor& picks,
                   const Tensor& least, const Tensor& workspace, uintptr_t stream) {
  MOE_CHECK(scores.sizes.size() == 3, "scores: ", scores.sizes.size(), " dimensions, expected 3");
  const int64_t G = scores.sizes[0], M = scores.sizes[1], N = scores.sizes[2];
  scores.expect("scores", F32, {G, M, N});
  MOE_CHECK(G * M * N < (int64_t(1) << 31), "scores: ", G * M * N, " elements, expected less than 2^31");
  if (counts) counts->expect("counts", I32, {G, N});
  picks.expect("picks", Dtype::kBool, {G, M, N});
  least.expect("least", F32, {G, N});
  cuda::select_top(G, M, N, scores.as<float>(), optional(counts).as<int32_t>(), count, picks.as<uint8_t>(),
                   least.as<float>(), scratch_of(workspace, cuda::select_top_workspace_bytes(G, M, N)),
                   stream_of(stream));
}

void py_select_experts(const Tensor& scores, int64_t groups, int64_t groups_taken, const Tensor& topk_ids,
                       uintptr_t stream) {
  const int64_t T = scores.sizes.at(0), E = scores.sizes.at(1), K = topk_ids.sizes.at(1);
  scores.expect("scores", F32, {T, E});
  topk_ids.expect("topk_ids", I32, {T, K});
  MOE_CHECK(T * E < (int64_t(1) << 31), "scores: ", T * E, " elements, expected less than 2^31");
  MOE_CHECK(K > 0 && K <= E, "top_k: ", K, ", expected 1..", E);
  MOE_CHECK(groups > 0 && E % groups == 0, "groups: ", groups, ", expected a divisor of ", E);
  MOE_CHECK(groups_taken > 0 && groups_taken <= groups, "groups_taken: ", groups_taken, ", expected 1..", groups);
  cuda::select_experts(T, E, K, groups, groups_taken, scores.as<float>(), topk_ids.as<int32_t>(), stream_of(stream));
}

void py_dispatch_bwd(const Tensor& drow_weight, const Tensor& row_pick, const Tensor& out, uintptr_t stream) {
  const int64_t R = row_pick.sizes.at(0), count = out.sizes.at(0);
  drow_weight.expect("drow_weight", F32, {R});
  row_pick.expect("row_pick", I32, {R});
  out.expect("out", F32, {count});
  cuda::dispatch_bwd(R, count, drow_weight.as<float>(), row_pick.as<int32_t>(), out.as<float>(), stream_of(stream));
}

int64_t py_moe_mlp_fwd_workspace_bytes(const Tensor& x, const Plan& plan, const WeightViews& weights,
                                       const std::string& activation, bool tf32) {
  return cuda::moe_mlp_fwd_workspace_bytes(experts_of(x, plan, weights, activation, tf32).s);
}

int64_t py_moe_mlp_bwd_workspace_bytes(const Tensor& x, const Plan& plan, const WeightViews& weights,
                                       const std::string& activation, bool tf32, bool recompute) {
  return cuda::moe_mlp_bwd_workspace_bytes(experts_of(x, plan, weights, activation, tf32).s, recompute);
}

void py_experts_fwd(const Tensor& x, const Plan& plan, const WeightViews& weights, const std::string& activation,
                    bool tf32, const Tensor& y_rows, const Maybe& gate_up, const Tensor& workspace, uintptr_t stream) {
  const auto [s, w] = experts_of(x, plan, weights, activation, tf32);
  y_rows.expect("y_rows", s.dtype, {s.R, s.H});
  if (gate_up) gate_up->expect("gate_up", s.dtype, {s.R, s.halves() * s.I});
  cuda::experts_fwd(s, plan_view(plan, s.T, s.E), w, x.data, y_rows.data, optional(gate_up).data,
                    scratch_of(workspace, cuda::experts_fwd_workspace_bytes(s)), stream_of(stream));
}

void py_experts_bwd(const Tensor& dy_rows, const Tensor& x, const Plan& plan, const Tensor& gate_up,
                    const WeightViews& weights, const std::string& activation, bool tf32, const Tensor& dx,
                    const Tensor& dgate_up_proj, const Tensor& ddown_proj, const Tensor& workspace, uintptr_t stream) {
  const auto [s, w] = experts_of(x, plan, weights, activation, tf32);
  dy_rows.expect("dy_rows", s.dtype, {s.R, s.H});
  gate_up.expect("gate_up", s.dtype, {s.R, s.halves() * s.I});
  expect_aligned("dy_rows", dy_rows);
  dx.expect("dx", s.dtype, x.sizes);
  const ExpertGrads grads = expert_grads(s, dgate_up_proj, ddown_proj, {}, {});
  cuda::experts_bwd(s, plan_view(plan, s.T, s.E), w, x.data, dy_rows.data, gate_up.data, dx.data, grads,
                    scratch_of(workspace, cuda::experts_bwd_workspace_bytes(s)), stream_of(stream));
}

void py_moe_mlp_fwd(const Tensor& x, const Plan& plan, const WeightViews& weights, const std::string& activation,
                    bool tf32, const Tensor& out, const Maybe& gate_up, const Maybe& shared_gate_up,
                    const Maybe& residual, const Maybe& gate, const Maybe& y, const Tensor& workspace,
                    uintptr_t stream) {
  const auto [s, w] = experts_of(x, plan, weights, activation, tf32);
  out.expect("out", residual ? residual->dtype : s.dtype, x.sizes);
  if (gate_up) gate_up->expect("gate_up", s.dtype, {s.R, s.halves() * s.I});
  if (shared_gate_up) shared_gate_up->expect("shared_gate_up", s.dtype, {s.T, s.halves() * s.Is});
  cuda::Residual around{};
  if (residual) {
    MOE_CHECK(gate && y, "gate, y: missing, expected with residual");
    residual->expect("residual", residual->dtype, x.sizes);
    expect_float("gate", *gate);
    gate->expect("gate", gate->dtype, {-1, s.H});
    y->expect("y", s.dtype, x.sizes);
    expect_aligned("residual", *residual);
    expect_aligned("gate", *gate);
    around = {residual->data, gate->data, residual->dtype, gate->dtype, gate->sizes[0], y->data};
  }
  cuda::moe_mlp_fwd(s, plan_view(plan, s.T, s.E), w, x.data, out.data, optional(gate_up).data,
                    optional(shared_gate_up).data, residual ? &around : nullptr,
                    scratch_of(workspace, cuda::moe_mlp_fwd_workspace_bytes(s)), stream_of(stream));
}

void py_moe_mlp_bwd(const Tensor& dout, const Tensor& x, const Plan& plan, const WeightViews& weights,
                    const Maybe& gate_up, const Maybe& shared_gate_up, const std::string& activation, bool tf32,
                    const Tensor& dx, const Tensor& drow_weight, const Tensor& dgate_up_proj, const Tensor& ddown_proj,
                    const Maybe& dshared_gate_up_proj, const Maybe& dshared_down_proj, const Tensor& workspace,
                    uintptr_t stream) {
  const auto [s, w] = experts_of(x, plan, weights, activation, tf32);
  dout.expect("dout", s.dtype, x.sizes);
  expect_aligned("dout", dout);
  dx.expect("dx", s.dtype, x.sizes);
  drow_weight.expect("drow_weight", F32, {s.R});
  if (gate_up) gate_up->expect("gate_up", s.dtype, {s.R, s.halves() * s.I});
  if (shared_gate_up) shared_gate_up->expect("shared_gate_up", s.dtype, {s.T, s.halves() * s.Is});
  const ExpertGrads grads = expert_grads(s, dgate_up_proj, ddown_proj, dshared_gate_up_proj, dshared_down_proj);
  const bool recompute = !gate_up && !shared_gate_up;
  cuda::moe_mlp_bwd(s, plan_view(plan, s.T, s.E), w, x.data, dout.data, optional(gate_up).data,
                    optional(shared_gate_up).data, dx.data, drow_weight.as<float>(), nullptr, grads,
                    scratch_of(workspace, cuda::moe_mlp_bwd_workspace_bytes(s, recompute)), stream_of(stream));
}

void py_combine(const Tensor& y_rows, const Plan& plan, const Maybe& shared, const Tensor& out, uintptr_t stream) {
  expect_float("y_rows", y_rows);
  const int64_t R = y_rows.sizes.at(0), T = out.sizes.at(0), H = out.sizes.at(1);
  y_rows.expect("y_rows", y_rows.dtype, {R, H});
  out.expect("out", y_rows.dtype, {T, H});
  if (shared) shared->expect("shared", y_rows.dtype, {T, H});
  expect_width("y_rows", H);
  expect_aligned("y_rows", y_rows);
  expect_aligned("shared", optional(shared));
  const PlanView view = plan_view(plan, T, plan.at(kExpertCounts).sizes.at(0));
  MOE_CHECK(plan[kRowToken].sizes[0] == R, "plan: ", plan[kRowToken].sizes[0], " rows, expected the ", R, " of y_rows");
  cuda::CombineArgs args{};
  args.T = T, args.H = H, args.dtype = y_rows.dtype, args.rows = y_rows.data, args.row_weight = view.row_weight;
  args.token_row_offsets = view.token_row_offsets, args.token_rows = view.token_rows;
  args.shared = optional(shared).data, args.out = out.data;
  cuda::combine_fwd(args, stream_of(stream));
}

void py_combine_bwd(const Tensor& dout, const Tensor& y_rows, const Plan& plan, const Tensor& dy_rows,
                    const Tensor& drow_weight, uintptr_t stream) {
  expect_float("y_rows", y_rows);
  const int64_t R = y_rows.sizes.at(0), T = dout.sizes.at(0), H = dout.sizes.at(1);
  dout.expect("dout", y_rows.dtype, {T, H});
  y_rows.expect("y_rows", y_rows.dtype, {R, H});
  dy_rows.expect("dy_rows", y_rows.dtype, {R, H});
  drow_weight.expect("drow_weight", F32, {R});
  expect_width("y_rows", H);
  expect_aligned("dout", dout);
  expect_aligned("y_rows", y_rows);
  const PlanView view = plan_view(plan, T, plan.at(kExpertCounts).sizes.at(0));
  MOE_CHECK(plan[kRowToken].sizes[0] == R, "plan: ", plan[kRowToken].sizes[0], " rows, expected the ", R, " of y_rows");
  cuda::combine_bwd(R, H, y_rows.dtype, view.row_token, view.row_weight, dout.data, y_rows.data, dy_rows.data,
                    drow_weight.as<float>(), stream_of(stream));
}

void py_gated_residual_bwd(const Tensor& dout, const Tensor& y, const Tensor& gate, const Tensor& dy,
                           const Tensor& dgate, const Tensor& workspace, uintptr_t stream) {
  expect_float("dout", dout);
  const int64_t T = dout.sizes.at(0), H = dout.sizes.at(1), B = gate.sizes.at(0);
  dout.expect("dout", dout.dtype, {T, H});
  y.expect("y", y.dtype, {T, H});
  dy.expect("dy", y.dtype, {T, H});
  expect_float("gate", gate);
  gate.expect("gate", gate.dtype, {B, H});
  dgate.expect("dgate", gate.dtype, {B, H});
  expect_width("dout", H);
  expect_aligned("dout", dout);
  expect_aligned("y", y);
  expect_aligned("gate", gate);
  cuda::gated_residual_bwd(B, T, H, dout.dtype, y.dtype, gate.dtype, dout.data, y.data, gate.data, dy.data, dgate.data,
                           scratch_of(workspace, cuda::gated_residual_bwd_workspace_bytes(B, T, H)), stream_of(stream));
}

}  // namespace

#ifdef MOE_FIBERS
#define MOE_MODULE _cuda_fibers
#else
#define MOE_MODULE _cuda
#endif

PYBIND11_MODULE(MOE_MODULE, m) {
  m.doc() = "CUDA kernels of moe_kernels; call them through moe_kernels.backends.cuda.";
  py::register_local_exception<Error>(m, "Error", PyExc_ValueError);
#ifdef MOE_FIBERS
  m.attr("on_fibers") = true;  // the same sources on CPU memory, for tests
  m.def("launches", [] { return fibers::launches(); });
#else
  m.attr("on_fibers") = false;
  m.def("use_device", &cuda::use_device);
#endif
  m.def("early_starts", &cuda::early_starts);
  m.def("set_early_starts", &cuda::set_early_starts);
  m.def("aligned", &aligned);
  m.def("gating_fwd", &py_gating_fwd);
  m.def("gating_bwd", &py_gating_bwd);
  m.def("gating_bwd_workspace_bytes", &py_gating_bwd_workspace_bytes);
  m.def("modulated_gating_fwd", &py_modulated_gating_fwd);
  m.def("modulated_gating_bwd", &py_modulated_gating_bwd);
  m.def("modulated_gating_bwd_workspace_bytes", &py_modulated_gating_bwd_workspace_bytes);
  m.def("dispatch", &py_dispatch);
  m.def("dispatch_mask", &py_dispatch_mask);
  m.def("dispatch_mask_workspace_bytes", &cuda::dispatch_mask_workspace_bytes);
  m.def("select_top", &py_select_top);
  m.def("select_top_workspace_bytes", &cuda::select_top_workspace_bytes);
  m.def("select_experts", &py_select_experts);
  m.def("dispatch_bwd", &py_dispatch_bwd);
  m.def("dispatch_workspace_bytes", &cuda::dispatch_workspace_bytes);
  m.def("dispatch_expert_choice", &py_dispatch_expert_choice);
  m.def("dispatch_expert_choice_workspace_bytes", &cuda::dispatch_expert_choice_workspace_bytes);
  m.def("experts_fwd", &py_experts_fwd);
  m.def("experts_bwd", &py_experts_bwd);
  m.def("moe_mlp_fwd", &py_moe_mlp_fwd);
  m.def("moe_mlp_bwd", &py_moe_mlp_bwd);
  m.def("moe_mlp_fwd_workspace_bytes", &py_moe_mlp_fwd_workspace_bytes);
  m.def("moe_mlp_bwd_workspace_bytes", &py_moe_mlp_bwd_workspace_bytes);
  m.def("combine", &py_combine);
  m.def("combine_bwd", &py_combine_bwd);
  m.def("token_choice_fwd", &py_token_choice_fwd);
  m.def("token_choice_bwd", &py_token_choice_bwd);
  m.def("gated_residual_bwd", &py_gated_residual_bwd);
  m.def("gated_residual_bwd_workspace_bytes", &cuda::gated_residual_bwd_workspace_bytes);
}
