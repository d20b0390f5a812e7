// What the bindings of every device share: arguments from Python, checked for shape, dtype and room in their buffers.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "core/shapes.h"
#include "core/tensor.h"

namespace moe {

using Plan = std::vector<Tensor>;  // the tensors of RoutingPlan, in the order of its fields
enum PlanField {
  kRowWeight,
  kExpertCounts,
  kExpertOffsets,
  kRowToken,
  kRowPick,
  kTokenRowOffsets,
  kTokenRows,
  kFields
};
constexpr Dtype F32 = Dtype::kFloat32, I32 = Dtype::kInt32;

inline Activation activation_of(const std::string& name) {
  MOE_CHECK(name == "swiglu" || name == "gelu", "activation: '", name, "', expected 'swiglu' or 'gelu'");
  return name == "swiglu" ? Activation::kSwiGLU : Activation::kGELU;
}

inline void expect_float(const char* name, const Tensor& t) {
  MOE_CHECK(int(t.dtype) < kFloatDtypes, name, ": dtype tag ", int(t.dtype), ", expected a float, 0 to 2");
}

inline void expect_fields(const Plan& plan) {
  MOE_CHECK(plan.size() == kFields, "plan: ", plan.size(), " tensors, expected ", int(kFields));
}

// The plan's pointers, its sizes checked; R is the number of rows.
inline PlanView plan_view(const Plan& plan, int64_t T, int64_t E) {
  expect_fields(plan);
  const size_t dimensions = plan[kRowToken].sizes.size();
  MOE_CHECK(dimensions == 1, "plan.row_token: ", dimensions, " dimensions, expected 1");
  const int64_t R = plan[kRowToken].sizes[0];
  plan[kRowWeight].expect("plan.row_weight", F32, {R});
  plan[kExpertOffsets].expect("plan.expert_offsets", I32, {E + 1});
  plan[kRowToken].expect("plan.row_token", I32, {R});
  plan[kTokenRowOffsets].expect("plan.token_row_offsets", I32, {T + 1});
  plan[kTokenRows].expect("plan.token_rows", I32, {R});
  return {plan[kRowWeight].as<float>(), plan[kExpertOffsets].as<int32_t>(), plan[kRowToken].as<int32_t>(),
          plan[kTokenRowOffsets].as<int32_t>(), plan[kTokenRows].as<int32_t>()};
}

// The pointers of a plan that is to be filled.
inline PlanOut out_of(const Plan& plan, int64_t T, int64_t E, int64_t R) {
  expect_fields(plan);
  MOE_CHECK(R < (int64_t(1) << 31) && T < (int64_t(1) << 31), "plan: ", R, " rows, expected less than 2^31");
  const int64_t sizes[] = {R, E, E + 1, R, R, T + 1, R};
  for (int i = 0; i < kFields; ++i) plan[i].expect("plan", i == kRowWeight ? F32 : I32, {sizes[i]});
  const auto integers = [&](PlanField field) { return plan[field].as<int32_t>(); };
  return {plan[kRowWeight].as<float>(), integers(kExpertCounts),    integers(kExpertOffsets), integers(kRowToken),
          integers(kRowPick),           integers(kTokenRowOffsets), integers(kTokenRows)};
}

inline DProbs dprobs_of(const std::optional<Tensor>& t, const GatingSizes& s) {
  if (!t) return {};
  const bool one_row = t->sizes.at(0) == 1;
  t->expect("dprobs", F32, {one_row ? 1 : s.T, s.E});
  return {t->as<float>(), one_row ? 0 : s.E};
}

inline Tensor optional(const std::optional<Tensor>& t) { return t ? *t : Tensor{}; }

}  // namespace moe
