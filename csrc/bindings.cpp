// The CPU's Python module. Every tensor arrives with its sizes, strides and readable bytes, and is checked against what
// the kernel will touch before the kernel runs; weights come as addresses, whose memory the caller vouches for. The GIL
// is released around the work.
#include "bindings.h"

#include <cstring>
#include <locale>
#include <memory>
#include <sstream>

#include "bindings_launch.h"
#include "core/workspace.h"
#include "cpu/blocking.h"
#include "cpu/combine.h"
#include "cpu/dispatch.h"
#include "cpu/experts.h"
#include "cpu/gating.h"
#include "cpu/kernels.h"
#include "cpu/levels.h"
#include "cpu/peak.h"
#include "cpu/selection.h"

namespace py = pybind11;
using namespace moe;

namespace {

void expect_indices(const char* name, const int32_t* values, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i)
    MOE_CHECK(values[i] >= 0 && values[i] < limit, name, ": ", values[i], " at ", i, ", expected 0..", limit - 1);
}

void expect_offsets(const char* name, const int32_t* offsets, int64_t count, int64_t total) {
  MOE_CHECK(offsets[0] == 0 && offsets[count] == total, name, ": from ", offsets[0], " to ", offsets[count],
            ", expected 0 to ", total);
  for (int64_t i = 0; i < count; ++i)
    MOE_CHECK(offsets[i] <= offsets[i + 1], name, ": decreases at ", i, ", expected ascending offsets");
}

PlanView view_of(const Plan& plan, int64_t T, int64_t E) {
  const PlanView view = plan_view(plan, T, E);
  const int64_t R = plan[kRowToken].sizes[0];
  expect_offsets("plan.expert_offsets", view.expert_offsets, E, R);
  expect_offsets("plan.token_row_offsets", view.token_row_offsets, T, R);
  expect_indices("plan.row_token", view.row_token, R, T);
  expect_indices("plan.token_rows", view.token_rows, R, R);
  return view;
}

Matrices make_matrices(const std::vector<uintptr_t>& addresses, int64_t rows, int64_t columns, int64_t ld,
                       bool transposed, int dtype) {
  MOE_CHECK(dtype >= 0 && dtype < kFloatDtypes, "dtype tag: ", dtype, ", expected 0 (fp32), 1 (bf16) or 2 (fp16)");
  MOE_CHECK(rows >= 0 && columns >= 0, "matrices: ", rows, " x ", columns, ", expected no negative size");
  const int64_t inner = transposed ? rows : columns;
  MOE_CHECK(ld >= inner, "ld: ", ld, ", expected at least the ", inner, " elements of a stored row");
  MOE_CHECK(!addresses.empty(), "addresses: none, expected one a matrix");
  Matrices m{{}, rows, columns, ld, transposed, Dtype(dtype)};
  m.data.reserve(addresses.size());
  for (const uintptr_t address : addresses) {
    MOE_CHECK(address != 0 || rows * columns == 0, "addresses: 0 at ", m.data.size(), ", expected an address");
    m.data.push_back(reinterpret_cast<void*>(address));
  }
  return m;
}

// Six kinds of matrices as Python lists them, or the three without a shared expert; None: absent.
using Kinds = std::vector<const Matrices*>;

ExpertTable table_of(const char* name, const Kinds& kinds, size_t count) {
  MOE_CHECK(kinds.size() == count, name, ": ", kinds.size(), " entries, expected ", count,
            count == 6 ? " (gate, up, down, shared_gate, shared_up, shared_down)" : " (gate, up, down)");
  const auto kind = [&](size_t i) { return i < count && kinds[i] ? *kinds[i] : Matrices{}; };
  return {kind(0), kind(1), kind(2), kind(3), kind(4), kind(5)};
}

// Biases as Python lists them: gate_up, down and, of six kinds of matrices, the shared expert's. None: absent; the list
// is empty where nothing has one.
using BiasViews = std::vector<std::optional<Tensor>>;

Biases biases_of(const char* name, const BiasViews& views, const MoeSizes& s) {
  MOE_CHECK(views.empty() || views.size() == (s.Is > 0 ? 4 : 2), name, ": ", views.size(), " entries, expected ",
            s.Is > 0 ? 4 : 2, ", or none");
  const std::vector<int64_t> shapes[] = {{s.E, s.halves() * s.I}, {s.E, s.H}, {s.halves() * s.Is}, {s.H}};
  float* found[4] = {};
  for (size_t i = 0; i < views.size(); ++i) {
    if (!views[i]) continue;
    views[i]->expect(name, F32, shapes[i]);
    found[i] = views[i]->as<float>();
  }
  return {found[0], found[1], found[2], found[3]};
}

// An activation as moe_kernels/activation.py spells it: "clamped_swiglu(limit=7.0, alpha=1.7, shift=1.0)" has numbers.
void set_function(const std::string& spelled, MoeSizes& s, ExpertTable& w) {
  const std::string clamped = "clamped_swiglu(";
  if (spelled == "gelu_tanh") {
    s.activation = Activation::kGELU, w.variant.plain = false;
  } else if (spelled.compare(0, clamped.size(), clamped) == 0) {
    s.activation = Activation::kSwiGLU, w.variant.plain = false;
    const std::pair<const char*, float*> numbers[] = {
        {"limit=", &w.variant.limit}, {"alpha=", &w.variant.alpha}, {"shift=", &w.variant.shift}};
    for (const auto& [key, number] : numbers) {
      const size_t at = spelled.find(key);
      std::istringstream in(at == std::string::npos ? "" : spelled.substr(at + std::strlen(key)));
      in.imbue(std::locale::classic());
      MOE_CHECK(in >> *number, "activation: '", spelled, "', expected a number behind ", key);
    }
  } else {
    s.activation = activation_of(spelled);
  }
}

// The six kinds of a table against the sizes; what may not be there at all has no matrices.
void expect_table(const std::string& name, const ExpertTable& table, const MoeSizes& s, bool all) {
  const auto expect = [&](const char* kind, const Matrices& m, int64_t count, int64_t rows, int64_t columns) {
    MOE_CHECK(m.present() || !all || count == 0, name, ".", kind, ": None, expected ", count, " matrices");
    if (!m.present()) return;
    MOE_CHECK(int64_t(m.data.size()) == count, name, ".", kind, ": ", m.data.size(), " matrices, expected ",
              count > 0 ? std::to_string(count) : "None");
    MOE_CHECK(m.rows == rows && m.columns == columns, name, ".", kind, ": ", m.rows, " x ", m.columns, ", expected ",
              rows, " x ", columns);
    MOE_CHECK(m.dtype == s.dtype, name, ".", kind, ": dtype tag ", int(m.dtype), ", expected ", int(s.dtype));
  };
  const int64_t gates = s.activation == Activation::kSwiGLU ? 1 : 0, shared = s.Is > 0 ? 1 : 0;
  expect("gate", table.gate, gates * s.E, s.I, s.H);
  expect("up", table.up, s.E, s.I, s.H);
  expect("down", table.down, s.E, s.H, s.I);
  expect("shared_gate", table.shared_gate, gates * shared, s.Is, s.H);
  expect("shared_up", table.shared_up, shared, s.Is, s.H);
  expect("shared_down", table.shared_down, shared, s.H, s.Is);
}

// Sizes read off the weights (no tokens, no rows), all weights checked against them; the table gets its variant.
MoeSizes sizes_of(ExpertTable& weights, const std::string& activation, int threads) {
  MOE_CHECK(threads > 0, "threads: ", threads, ", expected at least 1");
  MOE_CHECK(weights.down.present(), "weights.down: None, expected a matrix for each expert");
  MoeSizes s{};
  s.E = int64_t(weights.down.data.size()), s.H = weights.down.rows, s.I = weights.down.columns;
  s.Is = weights.shared_down.columns;
  s.dtype = weights.down.dtype, s.threads = threads;
  set_function(activation, s, weights);
  expect_table("weights", weights, s, true);
  return s;
}

// The same with x, the plan and the biases.
MoeSizes sizes_of(const Tensor& x, const Plan& plan, ExpertTable& weights, const std::string& activation,
                  const BiasViews& biases, int threads) {
  MoeSizes s = sizes_of(weights, activation, threads);
  weights.biases = biases_of("biases", biases, s);
  MOE_CHECK(x.sizes.size() == 2, "x: ", x.sizes.size(), " dimensions, expected 2");
  expect_fields(plan);
  s.T = x.sizes[0], s.R = plan[kRowToken].sizes.at(0);
  x.expect("x", s.dtype, {s.T, s.H});
  return s;
}

int64_t py_gating_fwd(const Tensor& x, const Tensor& weight, const Tensor& probs, const Tensor& topk_weights,
                      const Tensor& topk_ids, int threads) {
  expect_float("x", x);
  const GatingSizes s{x.sizes.at(0), x.sizes.at(1), weight.sizes.at(0), topk_ids.sizes.at(1), x.dtype, threads};
  x.expect("x", x.dtype, {s.T, s.H});
  weight.expect("gate_weight", F32, {s.E, s.H});
  probs.expect("probs", F32, {s.T, s.E});
  topk_weights.expect("topk_weights", F32, {s.T, s.K});
  topk_ids.expect("topk_ids", I32, {s.T, s.K});
  MOE_CHECK(s.K <= s.E, "top_k: ", s.K, ", expected at most ", s.E, " experts");
  py::gil_scoped_release release;
  return gating_fwd(s, x.data, weight.as<float>(), probs.as<float>(), topk_weights.as<float>(), topk_ids.as<int32_t>());
}

void py_gating_bwd(const std::optional<Tensor>& dtopk_weights, const std::optional<Tensor>& dprobs, const Tensor& x,
                   const Tensor& weight, const Tensor& topk_ids, const Tensor& probs, const Tensor& dx,
                   const Tensor& dweight, int threads) {
  expect_float("x", x);
  const int64_t K = dtopk_weights ? topk_ids.sizes.at(1) : 0;
  const GatingSizes s{x.sizes.at(0), x.sizes.at(1), weight.sizes.at(0), K, x.dtype, threads};
  x.expect("x", x.dtype, {s.T, s.H});
  dx.expect("dx", x.dtype, {s.T, s.H});
  weight.expect("gate_weight", F32, {s.E, s.H});
  dweight.expect("dgate_weight", F32, {s.E, s.H});
  probs.expect("probs", F32, {s.T, s.E});
  if (dtopk_weights) {
    dtopk_weights->expect("dtopk_weights", F32, {s.T, s.K});
    topk_ids.expect("topk_ids", I32, {s.T, s.K});
    expect_indices("topk_ids", topk_ids.as<int32_t>(), s.T * s.K, s.E);
  }
  py::gil_scoped_release release;
  gating_bwd(s, optional(dtopk_weights).as<float>(), dprobs_of(dprobs, s), x.data, weight.as<float>(),
             topk_ids.as<int32_t>(), probs.as<float>(), dx.data, dweight.as<float>());
}

void py_dispatch(const Tensor& topk_ids, const Tensor& topk_weights, int64_t num_experts, const Plan& plan) {
  const int64_t T = topk_ids.sizes.at(0), K = topk_ids.sizes.at(1);
  topk_ids.expect("topk_ids", I32, {T, K});
  topk_weights.expect("topk_weights", F32, {T, K});
  const PlanOut out = out_of(plan, T, num_experts, T * K);
  py::gil_scoped_release release;
  dispatch_fwd(T, K, num_experts, topk_ids.as<int32_t>(), topk_weights.as<float>(), out);
}

void py_dispatch_expert_choice(const Tensor& affinities, int64_t capacity, int64_t tokens_per_group, const Plan& plan,
                               int threads) {
  const int64_t T = affinities.sizes.at(0), E = affinities.sizes.at(1);
  affinities.expect("affinities", F32, {T, E});
  MOE_CHECK(tokens_per_group > 0 && T % tokens_per_group == 0, "tokens_per_group: ", tokens_per_group,
            ", expected a divisor of ", T, " tokens");
  MOE_CHECK(capacity > 0 && capacity <= tokens_per_group, "capacity: ", capacity, ", expected 1..", tokens_per_group);
  const PlanOut out = out_of(plan, T, E, E * (T / tokens_per_group) * capacity);
  py::gil_scoped_release release;
  dispatch_expert_choice_fwd(T, E, capacity, tokens_per_group, affinities.as<float>(), threads, out);
}

void py_dispatch_mask(const Tensor& weights, const Tensor& picks, const Plan& plan) {
  const int64_t T = weights.sizes.at(0), E = weights.sizes.at(1);
  weights.expect("weights", F32, {T, E});
  picks.expect("picks", Dtype::kBool, {T, E});
  expect_fields(plan);
  MOE_CHECK(T * E < (int64_t(1) << 31), "weights: ", T * E, " elements, expected less than 2^31");
  const int64_t R = plan[kRowToken].sizes.at(0);
  const PlanOut out = out_of(plan, T, E, R);
  py::gil_scoped_release release;
  dispatch_mask_fwd(T, E, R, weights.as<float>(), picks.as<uint8_t>(), out);
}

void py_select_top(const Tensor& scores, const std::optional<Tensor>& counts, int64_t count, const Tensor& picks,
                   const Tensor& least, int threads) {
  MOE_CHECK(scores.sizes.size() == 3, "scores: ", scores.sizes.size(), " dimensions, expected 3");
  const int64_t G = scores.sizes[0], M = scores.sizes[1], N = scores.sizes[2];
  scores.expect("scores", F32, {G, M, N});
  MOE_CHECK(M < INT32_MAX, "scores: ", M, " in a group, expected less than 2^31");
  if (counts) counts->expect("counts", I32, {G, N});
  picks.expect("picks", Dtype::kBool, {G, M, N});
  least.expect("least", F32, {G, N});
  py::gil_scoped_release release;
  select_top(G, M, N, scores.as<float>(), optional(counts).as<int32_t>(), count, threads, picks.as<uint8_t>(),
             least.as<float>());
}

void py_select_experts(const Tensor& scores, int64_t groups, int64_t groups_taken, const Tensor& topk_ids,
                       int threads) {
  const int64_t T = scores.sizes.at(0), E = scores.sizes.at(1), K = topk_ids.sizes.at(1);
  scores.expect("scores", F32, {T, E});
  topk_ids.expect("topk_ids", I32, {T, K});
  MOE_CHECK(K > 0 && K <= E, "top_k: ", K, ", expected 1..", E);
  MOE_CHECK(groups > 0 && E % groups == 0, "groups: ", groups, ", expected a divisor of ", E);
  MOE_CHECK(groups_taken > 0 && groups_taken <= groups, "groups_taken: ", groups_taken, ", expected 1..", groups);
  py::gil_scoped_release release;
  select_experts(T, E, K, groups, groups_taken, scores.as<float>(), threads, topk_ids.as<int32_t>());
}

void py_experts_fwd(const Tensor& x, const Plan& plan, const Kinds& weights, const std::string& activation,
                    const BiasViews& biases, const Tensor& y_rows, const std::optional<Tensor>& gate_up, int threads) {
  ExpertTable w = table_of("weights", weights, 3);
  const MoeSizes s = sizes_of(x, plan, w, activation, biases, threads);
  const PlanView view = view_of(plan, s.T, s.E);
  y_rows.expect("y_rows", s.dtype, {s.R, s.H});
  if (gate_up) gate_up->expect("gate_up", s.dtype, {s.R, s.halves() * s.I});
  py::gil_scoped_release release;
  experts_fwd(s, view, w, x.data, y_rows.data, optional(gate_up).data);
}

void py_experts_bwd(const Tensor& dy_rows, const Tensor& x, const Plan& plan, const Kinds& weights,
                    const Tensor& gate_up, const std::string& activation, const BiasViews& biases, const Tensor& dx,
                    const Kinds& grads, const BiasViews& dbiases, int threads) {
  ExpertTable w = table_of("weights", weights, 3), dw = table_of("grads", grads, 3);
  const MoeSizes s = sizes_of(x, plan, w, activation, biases, threads);
  const PlanView view = view_of(plan, s.T, s.E);
  dy_rows.expect("dy_rows", s.dtype, {s.R, s.H});
  gate_up.expect("gate_up", s.dtype, {s.R, s.halves() * s.I});
  dx.expect("dx", s.dtype, x.sizes);
  expect_table("grads", dw, s, false);
  dw.biases = biases_of("dbiases", dbiases, s);
  py::gil_scoped_release release;
  experts_bwd(s, view, w, x.data, dy_rows.data, gate_up.data, dx.data, dw);
}

void py_combine(const Tensor& y_rows, const Plan& plan, const std::optional<Tensor>& shared, const Tensor& out,
                int threads) {
  expect_float("y_rows", y_rows);
  const int64_t R = y_rows.sizes.at(0), T = out.sizes.at(0), H = out.sizes.at(1);
  y_rows.expect("y_rows", y_rows.dtype, {R, H});
  out.expect("out", y_rows.dtype, {T, H});
  if (shared) shared->expect("shared", y_rows.dtype, {T, H});
  expect_fields(plan);
  const PlanView view = view_of(plan, T, plan[kExpertCounts].sizes.at(0));
  MOE_CHECK(plan[kRowToken].sizes[0] == R, "plan: ", plan[kRowToken].sizes[0], " rows, expected the ", R, " of y_rows");
  py::gil_scoped_release release;
  combine_rows({T, H, y_rows.dtype, y_rows.dtype, threads, y_rows.data, view.row_weight, view.token_row_offsets,
                view.token_rows, optional(shared).data, out.data});
}

void py_combine_bwd(const Tensor& dout, const Tensor& y_rows, const Plan& plan, const Tensor& dy_rows,
                    const Tensor& drow_weight, int threads) {
  expect_float("y_rows", y_rows);
  const int64_t R = y_rows.sizes.at(0), T = dout.sizes.at(0), H = dout.sizes.at(1);
  dout.expect("dout", y_rows.dtype, {T, H});
  y_rows.expect("y_rows", y_rows.dtype, {R, H});
  dy_rows.expect("dy_rows", y_rows.dtype, {R, H});
  drow_weight.expect("drow_weight", F32, {R});
  expect_fields(plan);
  const PlanView view = view_of(plan, T, plan[kExpertCounts].sizes.at(0));
  MOE_CHECK(plan[kRowToken].sizes[0] == R, "plan: ", plan[kRowToken].sizes[0], " rows, expected the ", R, " of y_rows");
  py::gil_scoped_release release;
  combine_bwd(R, H, y_rows.dtype, threads, view.row_token, view.row_weight, dout.data, y_rows.data, dy_rows.data,
              drow_weight.as<float>());
}

std::unique_ptr<PackedWeights> py_pack(const Kinds& weights, const std::string& activation, int threads) {
  ExpertTable w = table_of("weights", weights, 6);
  const MoeSizes s = sizes_of(w, activation, threads);
  py::gil_scoped_release release;
  return std::make_unique<PackedWeights>(s, w);
}

void py_moe_mlp_fwd(const Tensor& x, const Plan& plan, const Kinds& weights, const std::string& activation,
                    const BiasViews& biases, const PackedWeights* packed, const Tensor& out,
                    const std::optional<Tensor>& gate_up, const std::optional<Tensor>& shared_gate_up, int threads) {
  ExpertTable w = table_of("weights", weights, 6);
  const MoeSizes s = sizes_of(x, plan, w, activation, biases, threads);
  const PlanView view = view_of(plan, s.T, s.E);
  out.expect("out", s.dtype, x.sizes);
  if (gate_up) gate_up->expect("gate_up", s.dtype, {s.R, s.halves() * s.I});
  if (shared_gate_up) shared_gate_up->expect("shared_gate_up", s.dtype, {s.T, s.halves() * s.Is});
  py::gil_scoped_release release;
  moe_mlp_fwd(s, view, w, packed, x.data, out.data, optional(gate_up).data, optional(shared_gate_up).data);
}

void py_moe_mlp_bwd(const Tensor& dout, const Tensor& x, const Plan& plan, const Kinds& weights,
                    const std::optional<Tensor>& gate_up, const std::optional<Tensor>& shared_gate_up,
                    const std::string& activation, const BiasViews& biases, const Tensor& dx, const Tensor& drow_weight,
                    const Kinds& grads, const BiasViews& dbiases, int threads) {
  ExpertTable w = table_of("weights", weights, 6), dw = table_of("grads", grads, 6);
  const MoeSizes s = sizes_of(x, plan, w, activation, biases, threads);
  const PlanView view = view_of(plan, s.T, s.E);
  dout.expect("dout", s.dtype, x.sizes);
  dx.expect("dx", s.dtype, x.sizes);
  drow_weight.expect("drow_weight", F32, {s.R});
  if (gate_up) gate_up->expect("gate_up", s.dtype, {s.R, s.halves() * s.I});
  if (shared_gate_up) shared_gate_up->expect("shared_gate_up", s.dtype, {s.T, s.halves() * s.Is});
  expect_table("grads", dw, s, false);
  dw.biases = biases_of("dbiases", dbiases, s);
  py::gil_scoped_release release;
  moe_mlp_bwd(s, view, w, x.data, dout.data, optional(gate_up).data, optional(shared_gate_up).data, dx.data,
              drow_weight.as<float>(), dw);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of moe_kernels; call them through moe_kernels.backends.native.";
  py::register_local_exception<Error>(m, "Error", PyExc_ValueError);
  py::class_<Tensor>(m, "Tensor", py::module_local(),
                     "A view of caller-owned memory: address, dtype tag, sizes, strides, readable bytes.")
      .def(py::init(
          [](uintptr_t data, int dtype, std::vector<int64_t> sizes, std::vector<int64_t> strides, int64_t nbytes) {
            MOE_CHECK(dtype >= 0 && dtype <= 4, "dtype tag: ", dtype,
                      ", expected 0 (fp32), 1 (bf16), 2 (fp16), 3 (int32) or 4 (bool)");
            return Tensor{reinterpret_cast<void*>(data), Dtype(dtype), std::move(sizes), std::move(strides), nbytes};
          }));
  py::class_<Block>(m, "Block", py::buffer_protocol(), "Memory out of the pool that survives between calls.")
      .def(py::init<int64_t>(), py::arg("bytes"))
      .def_buffer([](const Block& block) {
        return py::buffer_info(block.data(), 1, py::format_descriptor<uint8_t>::format(), block.bytes());
      });
  py::class_<Matrices>(
      m, "Matrices", py::module_local(),
      "Weights of one kind, or their gradients: an address for each (rows, columns) matrix of nn.Linear; "
      "transposed: stored (columns, rows). ld: elements between consecutive stored rows.")
      .def(py::init(&make_matrices), py::arg("addresses"), py::arg("rows"), py::arg("columns"), py::arg("ld"),
           py::arg("transposed"), py::arg("dtype_tag"));
  py::class_<PackedWeights>(m, "PackedWeights", "The weights of one layer as the forward kernels read them.")
      .def(py::init(&py_pack), py::arg("weights"), py::arg("activation"), py::arg("threads"))
      .def_property_readonly("bytes", &PackedWeights::bytes);
  m.def("gating_fwd", &py_gating_fwd);
  m.def("gating_bwd", &py_gating_bwd);
  m.def("dispatch", &py_dispatch);
  m.def("dispatch_expert_choice", &py_dispatch_expert_choice);
  m.def("dispatch_mask", &py_dispatch_mask);
  m.def("select_top", &py_select_top);
  m.def("select_experts", &py_select_experts);
  m.def("experts_fwd", &py_experts_fwd);
  m.def("experts_bwd", &py_experts_bwd);
  m.def("combine", &py_combine);
  m.def("combine_bwd", &py_combine_bwd);
  m.def("moe_mlp_fwd", &py_moe_mlp_fwd);
  m.def("moe_mlp_bwd", &py_moe_mlp_bwd);
  m.def("isa_level", [] { return std::string(kernels().name); }, "The ISA level in use (MOE_KERNELS_ISA forces one).");
  m.def("isa_levels", &isa_levels, "The ISA levels this CPU runs, best first.");
  m.def(
      "blocking",
      [] {
        const Caches c = caches();
        return py::dict(py::arg("l1") = c.l1, py::arg("l2") = c.l2, py::arg("l3") = c.l3,
                        py::arg("panel_bytes") = blocking().panel_bytes, py::arg("wave_bytes") = blocking().wave_bytes);
      },
      "Bytes of this machine's caches (MOE_KERNELS_CACHES overrides) and of what the kernels keep in L2 and L3.");
  static PyMethodDef key = {"launch_key", reinterpret_cast<PyCFunction>(&launch_key), METH_FASTCALL, nullptr};
  m.attr("launch_key") = py::reinterpret_steal<py::object>(PyCFunction_New(&key, nullptr));
  m.def("workspace_bytes", &workspace_bytes, "Bytes of memory kept between calls.");
  m.def("release_workspace", &release_workspace, "Give the kept memory back to the system.");
  m.def(
      "peak_gflops",
      [](const std::string& dtype, int threads, double seconds) {
        MOE_CHECK(dtype == "float32" || dtype == "bfloat16", "dtype: '", dtype, "', expected 'float32' or 'bfloat16'");
        py::gil_scoped_release release;
        return peak_gflops(dtype == "float32" ? F32 : Dtype::kBFloat16, threads, seconds);
      },
      py::arg("dtype"), py::arg("threads") = 1, py::arg("seconds") = 0.2,
      "Multiply-accumulate rate of a register-only loop, GFLOP/s over all threads.");
}
