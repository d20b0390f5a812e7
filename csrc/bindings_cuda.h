// What the CUDA bindings ask of buffers: alignment, widths, sizes of a call, and weights stacked or anywhere.
#pragma once
#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "bindings_torch.h"
#include "cuda/stream.h"

namespace moe {
namespace {

using Maybe = std::optional<Tensor>;
constexpr int64_t kAlignment = 16;  // bytes of one access of the kernels
constexpr int64_t kWhole = 64;      // elements: no engine's step of a sum begins in one matrix and ends in the next

void expect_aligned(const char* name, const Tensor& t) {
  MOE_CHECK(reinterpret_cast<uintptr_t>(t.data) % kAlignment == 0, name, ": address ", t.data,
            ", expected a multiple of ", kAlignment);
}

// Say whether all tensors among the arguments, and in tuples of them, begin where kernels want operands to begin.
bool aligned(const pybind11::tuple& arguments) {
  for (const pybind11::handle argument : arguments) {
    if (PyTuple_Check(argument.ptr())) {
      if (!aligned(pybind11::reinterpret_borrow<pybind11::tuple>(argument))) return false;
    } else if (dlpack::is_tensor(argument)) {
      if (reinterpret_cast<uintptr_t>(dlpack::address_of(dlpack::read(argument))) % kAlignment) return false;
    }
  }
  return true;
}

void expect_width(const char* name, int64_t width) {
  MOE_CHECK(width % 8 == 0, name, ": ", width, ", expected a multiple of 8");
}

using WeightViews = std::array<Maybe, 6>;  // MoEWeights, in order
struct Shape {
  int64_t rows, cols;
};
struct Experts {
  MoeSizes s;
  ExpertWeights w;
};

// Stacked weights, a slice for each expert; the shared expert's have two dimensions.
Slices stacked(const std::string& name, const Tensor& t, Dtype dtype, const std::vector<int64_t>& sizes) {
  t.expect(name.c_str(), dtype, sizes);
  expect_aligned(name.c_str(), t);
  const size_t last = sizes.size() - 1;
  return {t.data, sizes[last - 1] * sizes[last], last == 2 ? sizes[0] : 1};
}

// Matrices wherever each begins, slices of one tensor.
Slices slices(const std::string& name, const Tensor& t, Dtype dtype, Shape matrix) {
  MOE_CHECK(t.sizes.size() == 3 && t.strides.size() == 3, name, ": ", t.sizes.size(), " dimensions, expected 3");
  const int64_t count = t.sizes[0], step = t.strides[0], size = dtype_bytes(dtype);
  MOE_CHECK(step > 0 && step * size % kAlignment == 0, name, ": stride ", step, " in dimension 0, expected a multiple ",
            "of ", kAlignment, " bytes");
  Tensor one = t;
  one.sizes[0] = 1;
  one.expect(name.c_str(), dtype, {1, matrix.rows, matrix.cols});
  const int64_t most = (t.nbytes - matrix.rows * matrix.cols * size) / (step * size) + 1;
  MOE_CHECK(count > 0 && count <= std::min(most, int64_t(1) << 31), name, ": ", count, " slices, expected 1 to ", most,
            " in ", t.nbytes, " bytes, and at most 2^31");
  expect_aligned(name.c_str(), t);
  return {t.data, step, count};
}

// Weights of one kind, `halves` matrices an expert. What an index says is not checked: it is on the GPU.
Weights weights_of(const std::string& kind, const Tensor& routed, const Tensor& shared, const Maybe& index,
                   const MoeSizes& s, int64_t halves, Shape matrix, Shape shared_matrix) {
  const std::string name = kind + "_proj", shared_name = "shared_" + name;
  Weights w{};
  if (!index) {
    w.routed = stacked(name, routed, s.dtype, {s.E, halves * matrix.rows, matrix.cols});
    if (s.Is) w.shared = stacked(shared_name, shared, s.dtype, {halves * shared_matrix.rows, shared_matrix.cols});
    return w;
  }
  MOE_CHECK(s.I % kWhole == 0 && s.Is % kWhole == 0, kind, "_index: widths of ", s.I, " and ", s.Is,
            ", expected multiples of ", kWhole);
  index->expect((kind + "_index").c_str(), I32, {(s.E + (s.Is > 0)) * halves});
  w.routed = slices(name, routed, s.dtype, matrix), w.index = index->as<int32_t>();
  if (s.Is) w.shared = slices(shared_name, shared, s.dtype, shared_matrix);
  return w;
}

// Sizes and weights of a call of E experts with R rows, with what the kernels ask of widths and addresses.
Experts experts_of(const Tensor& x, int64_t E, int64_t R, const WeightViews& views, const std::string& activation,
                   bool tf32) {
  const auto& [gate_up, down, shared_gate_up, shared_down, gate_up_index, down_index] = views;
  MOE_CHECK(gate_up && down, "gate_up_proj, down_proj: missing");
  MOE_CHECK(!shared_gate_up == !shared_down, "shared weights: one of two, expected both or none");
  MOE_CHECK(x.sizes.size() == 2, "x: ", x.sizes.size(), " dimensions, expected 2");
  MOE_CHECK(down->sizes.size() == 3, "down_proj: ", down->sizes.size(), " dimensions, expected 3");
  expect_float("x", x);
  MoeSizes s{};
  s.T = x.sizes[0], s.H = x.sizes[1], s.E = E, s.R = R;
  s.I = down->sizes.at(2), s.Is = shared_down ? shared_down->sizes.at(down_index ? 2 : 1) : 0;
  s.dtype = x.dtype, s.activation = activation_of(activation), s.threads = 1, s.tf32 = tf32;
  x.expect("x", s.dtype, {s.T, s.H});
  expect_width("x", s.H);
  expect_width("down_proj", s.I);
  expect_width("shared_down_proj", s.Is);
  expect_aligned("x", x);
  ExpertWeights w{};
  w.gate_up_proj =
      weights_of("gate_up", *gate_up, optional(shared_gate_up), gate_up_index, s, s.halves(), {s.I, s.H}, {s.Is, s.H});
  w.down_proj = weights_of("down", *down, optional(shared_down), down_index, s, 1, {s.H, s.I}, {s.H, s.Is});
  return {s, w};
}

Experts experts_of(const Tensor& x, const Plan& plan, const WeightViews& views, const std::string& activation,
                   bool tf32) {
  expect_fields(plan);
  return experts_of(x, plan[kExpertCounts].sizes.at(0), plan[kRowToken].sizes.at(0), views, activation, tf32);
}

ExpertGrads expert_grads(const MoeSizes& s, const Tensor& dgate_up_proj, const Tensor& ddown_proj,
                         const Maybe& dshared_gate_up_proj, const Maybe& dshared_down_proj) {
  dgate_up_proj.expect("dgate_up_proj", s.dtype, {s.E, s.halves() * s.I, s.H});
  ddown_proj.expect("ddown_proj", s.dtype, {s.E, s.H, s.I});
  if (s.Is > 0) {
    optional(dshared_gate_up_proj).expect("dshared_gate_up_proj", s.dtype, {s.halves() * s.Is, s.H});
    optional(dshared_down_proj).expect("dshared_down_proj", s.dtype, {s.H, s.Is});
  }
  return {dgate_up_proj.data, ddown_proj.data, optional(dshared_gate_up_proj).data, optional(dshared_down_proj).data};
}

GatingSizes gating_sizes(const Tensor& x, const Tensor& weight, int64_t K, Dtype weight_dtype = F32) {
  expect_float("x", x);
  MOE_CHECK(x.sizes.size() == 2, "x: ", x.sizes.size(), " dimensions, expected 2");
  const GatingSizes s{x.sizes[0], x.sizes[1], weight.sizes.at(0), K, x.dtype, 1};
  x.expect("x", x.dtype, {s.T, s.H});
  weight.expect("gate_weight", weight_dtype, {s.E, s.H});
  MOE_CHECK(K >= 0 && K <= s.E, "top_k: ", K, ", expected 0 to ", s.E, " experts");
  expect_width("x", s.H);
  expect_aligned("x", x);
  expect_aligned("gate_weight", weight);
  return s;
}

cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

void* scratch_of(const Tensor& workspace, int64_t bytes) {
  MOE_CHECK(workspace.nbytes >= bytes, "workspace: ", workspace.nbytes, " bytes, expected at least ", bytes);
  expect_aligned("workspace", workspace);
  return workspace.data;
}

}  // namespace
}  // namespace moe
