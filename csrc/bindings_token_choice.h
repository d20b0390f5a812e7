// The bindings of token choice and the experts behind it: one call a direction, its memory out of two allocations.
#pragma once
#include "bindings_cuda.h"
#include "cuda/token_choice.h"

namespace moe {
namespace {

// What a call is for: its sizes, weights and where forward keeps what backward reads.
struct TokenChoice {
  cuda::TokenChoiceSizes sizes;
  ExpertWeights w;
  cuda::Kept kept;
};

TokenChoice token_choice_of(const Tensor& x, const Tensor& gate_weight, const WeightViews& weights, int64_t K,
                            const std::string& activation, bool tf32, bool keep_gate_up) {
  expect_float("gate_weight", gate_weight);
  const GatingSizes g = gating_sizes(x, gate_weight, K, gate_weight.dtype);
  MOE_CHECK(g.T * K < (int64_t(1) << 31), "plan: ", g.T * K, " rows, expected less than 2^31");
  const Experts experts = experts_of(x, g.E, g.T * K, weights, activation, tf32);
  const cuda::TokenChoiceSizes sizes{g, experts.s, gate_weight.dtype};
  return {sizes, experts.w, cuda::Kept(sizes, keep_gate_up)};
}

// Memory that `allocate` gives, a function of Python from a number of int32 to a tensor of so many.
struct Memory {
  pybind11::object owner;
  void* data;

  Memory(const pybind11::function& allocate, int64_t bytes) : owner(allocate((bytes + 3) / 4)) {
    data = scratch_of(dlpack::tensor_of(owner), bytes);
  }
};

// Return the memory of what backward reads and the offsets of its pieces (cuda::Kept) in bytes. The scratch is free
// again when the call returns: its stream is the one that `allocate` allocates for. Without `keep` both are one memory.
pybind11::tuple py_token_choice_fwd(const Tensor& x, const Tensor& gate_weight, const WeightViews& weights, int64_t K,
                                    const std::string& activation, bool tf32, bool keep, bool keep_gate_up,
                                    const Tensor& out, const pybind11::function& allocate, uintptr_t stream) {
  const TokenChoice call = token_choice_of(x, gate_weight, weights, K, activation, tf32, keep_gate_up);
  out.expect("out", x.dtype, x.sizes);
  cuda::Scratch counting;
  cuda::take_forward(counting, call.sizes);
  const int64_t whole = call.kept.bytes() + (keep ? 0 : counting.bytes());  // pieces are multiples of 256 bytes
  const Memory kept(allocate, whole);
  const std::optional<Memory> workspace = keep ? std::optional<Memory>({allocate, counting.bytes()}) : std::nullopt;
  cuda::Scratch scratch(workspace ? workspace->data : static_cast<char*>(kept.data) + call.kept.bytes());
  cuda::token_choice_fwd(call.sizes, call.w, x.data, gate_weight.data, out.data, call.kept, kept.data,
                         cuda::take_forward(scratch, call.sizes), stream_of(stream));
  return pybind11::make_tuple(kept.owner, call.kept.offsets());
}

// dx: all of it with dgate_weight, else what goes through the experts.
void py_token_choice_bwd(const Tensor& dout, double aux_scale, const Tensor& x, const Tensor& gate_weight,
                         const WeightViews& weights, const Tensor& kept, int64_t K, const std::string& activation,
                         bool tf32, bool kept_gate_up, const Tensor& dx, const Tensor& dgate_up_proj,
                         const Tensor& ddown_proj, const Maybe& dshared_gate_up_proj, const Maybe& dshared_down_proj,
                         const Maybe& dgate_weight, const pybind11::function& allocate, uintptr_t stream) {
  const TokenChoice call = token_choice_of(x, gate_weight, weights, K, activation, tf32, kept_gate_up);
  const MoeSizes& s = call.sizes.experts;
  dout.expect("dout", s.dtype, x.sizes);
  expect_aligned("dout", dout);
  dx.expect("dx", s.dtype, x.sizes);
  const ExpertGrads experts = expert_grads(s, dgate_up_proj, ddown_proj, dshared_gate_up_proj, dshared_down_proj);
  if (dgate_weight) dgate_weight->expect("dgate_weight", gate_weight.dtype, gate_weight.sizes);
  MOE_CHECK(kept.nbytes >= call.kept.bytes(), "kept: ", kept.nbytes, " bytes, expected at least ", call.kept.bytes());
  expect_aligned("kept", kept);
  cuda::Scratch counting;
  cuda::take_backward(counting, call.sizes, !kept_gate_up);
  const Memory workspace(allocate, counting.bytes());
  cuda::Scratch scratch(workspace.data);
  cuda::token_choice_bwd(call.sizes, call.w, x.data, dout.data, gate_weight.data, float(aux_scale), call.kept,
                         kept.data, {dx.data, experts, optional(dgate_weight).data},
                         cuda::take_backward(scratch, call.sizes, !kept_gate_up), stream_of(stream));
}

}  // namespace
}  // namespace moe
