// What callgrind counts (instructions.py): the fused layer once, forward and backward, at the digits' shape; argv[1] is
// the storage dtype, fp32 or bf16. Inputs are fixed and the routing is uneven; results are judged elsewhere.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/experts.h"

using namespace moe;

namespace {

// Numbers in [-1, 1) that both dtypes hold exactly.
std::vector<char> numbers(Dtype dtype, int64_t count) {
  std::vector<char> out(count * dtype_bytes(dtype));
  uint32_t state = 1;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    const float value = int(state >> 25) / 64.0f - 1;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits >>= dtype == Dtype::kFloat32 ? 0 : 16;
    std::memcpy(&out[i * dtype_bytes(dtype)], &bits, dtype_bytes(dtype));
  }
  return out;
}

}  // namespace

int main(int, char** argv) {
  const Dtype dtype = std::string(argv[1]) == "bf16" ? Dtype::kBFloat16 : Dtype::kFloat32;
  const int64_t T = 64, H = 96, E = 4, K = 2, I = 192, Is = 96, R = T * K, U = 2 * I, Us = 2 * Is;
  MoeSizes s{};
  s.T = T, s.H = H, s.E = E, s.R = R, s.I = I, s.Is = Is;
  s.dtype = dtype, s.activation = Activation::kSwiGLU, s.threads = 1;

  std::vector<int32_t> ids(R), counts(E), offsets(E + 1), row_token(R), row_pick(R), token_row_offsets(T + 1), token_rows(R);
  std::vector<float> weights(R, 0.5f), row_weight(R), drow(R);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t k = 0; k < K; ++k) ids[t * K + k] = int32_t((t * t / 7 + k * 3) % (E - 1));
  PlanOut filled{};  // by name: revisions have their fields in different orders
  filled.expert_counts = counts.data(), filled.expert_offsets = offsets.data(), filled.row_token = row_token.data();
  filled.row_weight = row_weight.data(), filled.row_pick = row_pick.data();
  filled.token_row_offsets = token_row_offsets.data(), filled.token_rows = token_rows.data();
  dispatch_fwd(T, K, E, ids.data(), weights.data(), filled);
  PlanView plan{};
  plan.expert_offsets = offsets.data(), plan.row_token = row_token.data(), plan.row_weight = row_weight.data();
  plan.token_row_offsets = token_row_offsets.data(), plan.token_rows = token_rows.data();

  const auto x = numbers(dtype, T * H), up = numbers(dtype, E * U * H), down = numbers(dtype, E * H * I);
  const auto shared_up = numbers(dtype, Us * H), shared_down = numbers(dtype, H * Is), dout = numbers(dtype, T * H);
  auto out = x, dx = x, dup = up, ddown = down, dshared_up = shared_up, dshared_down = shared_down;
  auto gate_up = numbers(dtype, R * U), shared_gate_up = numbers(dtype, T * Us);
  // The `part`-th (rows, columns) of each of `count` stacks of `parts`.
  const auto matrices = [&](const std::vector<char>& stack, int64_t count, int part, int parts, int64_t rows, int64_t columns) {
    Matrices m{{}, rows, columns, columns, false, dtype};
    for (int64_t i = 0; i < count; ++i)
      m.data.push_back(const_cast<char*>(stack.data()) + (i * parts + part) * rows * columns * dtype_bytes(dtype));
    return m;
  };
  const auto table = [&](const auto& first, const auto& second, const auto& shared_first, const auto& shared_second) {
    return ExpertTable{matrices(first, E, 0, 2, I, H),         matrices(first, E, 1, 2, I, H),
                       matrices(second, E, 0, 1, H, I),        matrices(shared_first, 1, 0, 2, Is, H),
                       matrices(shared_first, 1, 1, 2, Is, H), matrices(shared_second, 1, 0, 1, H, Is)};
  };
  const ExpertTable w = table(up, down, shared_up, shared_down);
  moe_mlp_fwd(s, plan, w, nullptr, x.data(), out.data(), gate_up.data(), shared_gate_up.data());
  moe_mlp_bwd(s, plan, w, x.data(), dout.data(), gate_up.data(), shared_gate_up.data(), dx.data(), drow.data(),
              table(dup, ddown, dshared_up, dshared_down));
}
