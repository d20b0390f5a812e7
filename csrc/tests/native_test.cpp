// Standalone test of csrc/cpu, so that sanitizers see our code and not Python's: every room against a double-precision
// loop, forward and backward, at awkward sizes, on one and on three threads, at every ISA level (a process each).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../core/error.h"
#include "../core/workspace.h"
#include "../cpu/combine.h"
#include "../cpu/dispatch.h"
#include "../cpu/experts.h"
#include "../cpu/gating.h"
#include "../cpu/kernels.h"
#include "../cpu/levels.h"
#include "../cpu/peak.h"

using namespace moe;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using Ints = std::vector<int32_t>;

namespace {

int passed = 0, failed = 0;

void expect(bool ok, const std::string& what) {
  (ok ? passed : failed)++;
  if (!ok) std::printf("FAILED %s\n", what.c_str());
}

double relative_error(const Floats& got, const Doubles& want) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return norm == 0 ? std::sqrt(error) : std::sqrt(error / norm);
}

// Values every dtype represents exactly, so that the oracle sees the same inputs.
Floats random_values(size_t count, float scale, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  Floats out(count);
  for (float& v : out) {
    v = normal(rng) * scale;
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    bits &= 0xFFFF0000u;
    std::memcpy(&v, &bits, 4);
  }
  return out;
}

// A buffer in storage dtype, sized to the byte so that the address sanitizer sees any overrun.
struct Buffer {
  Dtype dtype;
  std::vector<char> bytes;
  Buffer(Dtype d, size_t count) : dtype(d), bytes(count * size_t(dtype_bytes(d)), char(0xFF)) {}  // 0xFF..: NaN
  Buffer(Dtype d, const Floats& values) : Buffer(d, values.size()) {
    round_rows(values.data(), bytes.data(), int64_t(values.size()), d, 1);
  }
  Floats floats() const {
    Floats out(bytes.size() / size_t(dtype_bytes(dtype)));
    with_dtype(dtype, [&](auto element) {
      for (size_t i = 0; i < out.size(); ++i) out[i] = to_float(reinterpret_cast<const decltype(element)*>(bytes.data())[i]);
    });
    return out;
  }
  void* data() { return bytes.data(); }
};

struct Plan {
  Ints counts, offsets, row_token, row_pick, token_row_offsets, token_rows;
  Floats row_weight;
  Plan(int64_t T, int64_t E, int64_t R)
      : counts(E), offsets(E + 1), row_token(R), row_pick(R), token_row_offsets(T + 1), token_rows(R), row_weight(R) {}
  PlanOut out() {
    return {counts.data(),   offsets.data(),           row_token.data(), row_weight.data(),
            row_pick.data(), token_row_offsets.data(), token_rows.data()};
  }
  PlanView view() const {
    return {offsets.data(), row_token.data(), row_weight.data(), token_row_offsets.data(), token_rows.data()};
  }
};

double activate(Activation kind, double gate, double up, double* dgate, double* dup) {
  if (kind == Activation::kGELU) {
    const double cdf = 0.5 * std::erfc(-gate / std::sqrt(2.0));
    *dgate = cdf + gate * std::exp(-0.5 * gate * gate) / std::sqrt(2 * M_PI);
    *dup = 0;
    return gate * cdf;
  }
  const double s = 1 / (1 + std::exp(-gate));
  *dgate = up * s * (1 + gate * (1 - s));
  *dup = gate * s;
  return gate * s * up;
}

// One row through one expert in double: y, and given dy the contributions to dx, the weights and <dy, y>.
struct Oracle {
  const MoeSizes& s;
  double row(const float* x, const float* up_w, const float* down_w, int64_t I, double weight, double* out,
             const float* dout, double* dx, double* dup_w, double* ddown_w) const {
    const int64_t halves = s.halves();
    Doubles pre(size_t(halves * I)), act(I), dpre(size_t(halves * I)), dgate(I), dup(I);
    for (int64_t u = 0; u < halves * I; ++u)
      for (int64_t h = 0; h < s.H; ++h) pre[u] += double(x[h]) * up_w[u * s.H + h];
    for (int64_t i = 0; i < I; ++i)
      act[i] = activate(s.activation, pre[i], halves == 2 ? pre[I + i] : 0, &dgate[i], &dup[i]);
    double product = 0;
    for (int64_t h = 0; h < s.H; ++h) {
      double y = 0;
      for (int64_t i = 0; i < I; ++i) y += act[i] * down_w[h * I + i];
      out[h] += weight * y;
      product += y * dout[h];
    }
    for (int64_t i = 0; i < I; ++i) {
      double dact = 0;
      for (int64_t h = 0; h < s.H; ++h) {
        dact += double(dout[h]) * down_w[h * I + i];
        ddown_w[h * I + i] += weight * act[i] * dout[h];
      }
      dpre[i] = weight * dact * dgate[i];
      if (halves == 2) dpre[I + i] = weight * dact * dup[i];
    }
    for (int64_t u = 0; u < halves * I; ++u)
      for (int64_t h = 0; h < s.H; ++h) {
        dx[h] += dpre[u] * up_w[u * s.H + h];
        dup_w[u * s.H + h] += dpre[u] * x[h];
      }
    return product;
  }
};

void test_layer(MoeSizes s, int64_t K, const std::string& routing) {
  std::mt19937 rng(7);
  const int64_t U = s.halves() * s.I, Us = s.halves() * s.Is;
  const std::string name = routing + " T" + std::to_string(s.T) + " H" + std::to_string(s.H) + " I" +
                           std::to_string(s.I) + " Is" + std::to_string(s.Is) + " E" + std::to_string(s.E) +
                           (s.dtype == Dtype::kFloat32 ? " fp32" : " bf16");
  Ints ids(size_t(s.T * K));
  for (int64_t t = 0; t < s.T; ++t)
    for (int64_t k = 0; k < K; ++k)
      ids[t * K + k] = routing == "skewed" ? int32_t(k) : int32_t((t * 7 + k * 3 + t * t) % s.E);
  const Floats weights = random_values(ids.size(), 0.5f, rng);
  Plan plan(s.T, s.E, s.R);
  dispatch_fwd(s.T, K, s.E, ids.data(), weights.data(), plan.out());

  const Floats x = random_values(s.T * s.H, 1, rng), dout = random_values(s.T * s.H, 1, rng);
  const Floats up = random_values(s.E * U * s.H, 0.2f, rng), down = random_values(s.E * s.H * s.I, 0.2f, rng);
  const Floats sup = random_values(Us * s.H, 0.2f, rng), sdown = random_values(s.H * s.Is, 0.2f, rng);

  Doubles out(x.size()), dx(x.size()), drow(s.R), dup(up.size()), ddown(down.size()), dsup(sup.size()), dsdown(sdown.size());
  const Oracle oracle{s};
  for (int64_t e = 0; e < s.E; ++e)
    for (int64_t r = plan.offsets[e]; r < plan.offsets[e + 1]; ++r) {
      const int64_t t = plan.row_token[r] * s.H;
      drow[r] = oracle.row(&x[t], &up[e * U * s.H], &down[e * s.H * s.I], s.I, plan.row_weight[r], &out[t], &dout[t],
                           &dx[t], &dup[e * U * s.H], &ddown[e * s.H * s.I]);
    }
  for (int64_t t = 0; s.Is > 0 && t < s.T; ++t)
    oracle.row(&x[t * s.H], sup.data(), sdown.data(), s.Is, 1, &out[t * s.H], &dout[t * s.H], &dx[t * s.H], dsup.data(),
               dsdown.data());

  const double limit = s.dtype == Dtype::kFloat32 ? 2e-6 : 1.5e-2;
  std::vector<std::vector<char>> bits;
  for (int threads : {1, 3}) {
    s.threads = threads;
    Buffer bx(s.dtype, x), bdout(s.dtype, dout), bup(s.dtype, up), bdown(s.dtype, down), bsup(s.dtype, sup),
        bsdown(s.dtype, sdown);
    Buffer bout(s.dtype, x.size()), gate_up(s.dtype, s.R * U), shared_gate_up(s.dtype, s.Is ? s.T * Us : 0),
        bdx(s.dtype, x.size()), bdup(s.dtype, up.size()), bddown(s.dtype, down.size()), bdsup(s.dtype, sup.size()),
        bdsdown(s.dtype, sdown.size()), y_rows(s.dtype, s.R * s.H), room_out(s.dtype, x.size());
    Floats bdrow(s.R);
    const ExpertWeights w{bup.data(), bdown.data(), s.Is ? bsup.data() : nullptr, s.Is ? bsdown.data() : nullptr};
    moe_mlp_fwd(s, plan.view(), w, nullptr, bx.data(), bout.data(), gate_up.data(), shared_gate_up.data());
    moe_mlp_bwd(s, plan.view(), w, bx.data(), bdout.data(), gate_up.data(), shared_gate_up.data(), bdx.data(),
                bdrow.data(), {bdup.data(), bddown.data(), bdsup.data(), bdsdown.data()});
    const std::string where = name + " threads " + std::to_string(threads);
    expect(relative_error(bout.floats(), out) < limit, where + " out");
    expect(relative_error(bdx.floats(), dx) < limit, where + " dx");
    expect(relative_error(bdrow, drow) < limit, where + " drow_weight");
    expect(relative_error(bdup.floats(), dup) < limit, where + " dgate_up_proj");
    expect(relative_error(bddown.floats(), ddown) < limit, where + " ddown_proj");
    if (s.Is) expect(relative_error(bdsup.floats(), dsup) < limit, where + " dshared_gate_up_proj");
    if (s.Is) expect(relative_error(bdsdown.floats(), dsdown) < limit, where + " dshared_down_proj");
    const PackedWeights packed(s, w);
    Buffer again(s.dtype, x.size());
    moe_mlp_fwd(s, plan.view(), w, &packed, bx.data(), again.data(), nullptr, nullptr);
    expect(again.bytes == bout.bytes, where + " the same bits from packed weights");
    const Floats first = bdup.floats();
    for (int64_t e = 0; e < s.E; ++e)
      if (plan.counts[e] == 0)
        expect(std::all_of(&first[e * U * s.H], &first[e * U * s.H] + U * s.H, [](float v) { return v == 0; }),
               where + " exact zeros of an expert without rows");
    bits.push_back(bout.bytes);
    bits.push_back(bdx.bytes);
    bits.push_back(bdup.bytes);
    if (s.Is == 0) {  // the rooms one by one give the same as the fused layer
      experts_fwd(s, plan.view(), w, bx.data(), y_rows.data(), nullptr);
      combine_rows({s.T, s.H, s.dtype, s.dtype, threads, y_rows.data(), plan.row_weight.data(), plan.token_row_offsets.data(),
                    plan.token_rows.data(), nullptr, room_out.data()});
      expect(relative_error(room_out.floats(), out) < limit, where + " rooms one by one");
    }
  }
  for (int i = 0; i < 3; ++i) expect(bits[i] == bits[i + 3], name + " same bits on one and three threads");
}

// Every fp16 value, and floats around every rounding boundary, through the vector conversions of this level.
void test_half() {
  const int64_t count = 1 << 16;
  std::vector<fp16> halves(count), back(count);
  Floats floats(3 * count);
  int64_t lost = 0, changed = 0, misrounded = 0;
  for (int64_t i = 0; i < count; ++i) {
    halves[i].bits = uint16_t(i);
    const float value = to_float(halves[i]), next = to_float(fp16{uint16_t(i + 1)});
    fp16 scalar;
    assign(scalar, value);
    lost += scalar.bits != i && !std::isnan(value);
    const float middle = value + (next - value) / 2;
    floats[3 * i] = middle, floats[3 * i + 1] = std::nextafter(middle, value), floats[3 * i + 2] = std::nextafter(middle, next);
  }
  const int32_t offsets[] = {0, 1}, row = 0;
  kernels().combine[2][2](halves.data(), nullptr, offsets, &row, nullptr, back.data(), count, 0, 1);
  for (int64_t i = 0; i < count; ++i)  // 0 + -0 is 0
    changed += back[i].bits != i && i != 0x8000 && !std::isnan(to_float(halves[i]));
  std::vector<fp16> rounded(floats.size());
  kernels().combine[0][2](floats.data(), nullptr, offsets, &row, nullptr, rounded.data(), int64_t(floats.size()), 0, 1);
  for (size_t i = 0; i < floats.size(); ++i) {
    fp16 scalar;
    assign(scalar, floats[i] + 0.f);
    misrounded += rounded[i].bits != scalar.bits && !std::isnan(floats[i]);
  }
  expect(lost == 0, "every fp16 survives a float: " + std::to_string(lost) + " do not");
  expect(changed == 0, "every fp16 survives combine: " + std::to_string(changed) + " do not");
  expect(misrounded == 0, "fp16 is rounded to nearest even: " + std::to_string(misrounded) + " are not");
}

void test_gating(int64_t T, int64_t H, int64_t E, int64_t K) {
  std::mt19937 rng(3);
  const Floats x = random_values(T * H, 1, rng), weight = random_values(E * H, 0.3f, rng);
  const GatingSizes s{T, H, E, K, Dtype::kFloat32, 3};
  Floats probs(T * E), topk(T * K), dx(T * H), dweight(E * H);
  Ints ids(T * K);
  const std::string name = "gating E" + std::to_string(E);
  expect(gating_fwd(s, x.data(), weight.data(), probs.data(), topk.data(), ids.data()) == -1, name + " finite");
  Doubles want(T * E);
  for (int64_t t = 0; t < T; ++t) {
    double total = 0;
    for (int64_t e = 0; e < E; ++e) {
      double logit = 0;
      for (int64_t h = 0; h < H; ++h) logit += double(x[t * H + h]) * weight[e * H + h];
      total += want[t * E + e] = std::exp(logit);
    }
    for (int64_t e = 0; e < E; ++e) want[t * E + e] /= total;
    for (int64_t k = 0; k + 1 < K; ++k) expect(topk[t * K + k] >= topk[t * K + k + 1], name + " descending");
  }
  expect(relative_error(probs, want) < 1e-6, name + " probs");
  Floats bad = x;
  bad[H + 1] = INFINITY;
  if (T > 1)
    expect(gating_fwd(s, bad.data(), weight.data(), probs.data(), topk.data(), ids.data()) == 1, name + " not finite");
  const Floats dtopk(T * K, 1.f);
  gating_fwd(s, x.data(), weight.data(), probs.data(), topk.data(), ids.data());
  gating_bwd(s, dtopk.data(), {}, x.data(), weight.data(), ids.data(), probs.data(), dx.data(), dweight.data());
  Doubles dweight_want(E * H);
  for (int64_t t = 0; t < T; ++t) {
    double mean = 0;
    for (int64_t k = 0; k < K; ++k) mean += probs[t * E + ids[t * K + k]];
    for (int64_t e = 0; e < E; ++e) {
      const double g = std::count(&ids[t * K], &ids[t * K] + K, int32_t(e)) - mean;
      for (int64_t h = 0; h < H; ++h) dweight_want[e * H + h] += probs[t * E + e] * g * x[t * H + h];
    }
  }
  expect(relative_error(dweight, dweight_want) < 2e-6, name + " dgate_weight");
}

void test_expert_choice() {
  const int64_t T = 24, E = 5, group = 8, capacity = 3, R = E * T / group * capacity;
  std::mt19937 rng(5);
  Floats affinities = random_values(T * E, 1, rng);
  affinities[2 * E] = affinities[5 * E] = affinities[6 * E] = affinities[7 * E] = 9;  // a tie of four for three places
  Plan plan(T, E, R);
  dispatch_expert_choice_fwd(T, E, capacity, group, affinities.data(), 3, plan.out());
  expect(plan.row_token[0] == 2 && plan.row_token[1] == 5 && plan.row_token[2] == 6, "expert choice: lowest tokens win");
  for (int64_t r = 0; r < R; ++r)
    expect(plan.row_weight[r] == affinities[plan.row_pick[r]] && plan.row_pick[r] / E == plan.row_token[r],
           "expert choice: weight and pick");
  expect(plan.token_row_offsets[T] == R, "expert choice: token rows");
}

void expect_error(const std::function<void()>& call, const std::string& what) {
  try {
    call();
    expect(false, what + ": no error");
  } catch (const Error&) {
    expect(true, what);
  }
}

// Without MOE_KERNELS_ISA: this program once for every level the CPU runs.
int test_all_levels(const std::string& program) {
  int failures = 0;
  for (const std::string& level : isa_levels())
    failures += std::system(("MOE_KERNELS_ISA=" + level + " '" + program + "'").c_str()) != 0;
  return failures;
}

}  // namespace

int main(int, char** argv) {
  if (!std::getenv("MOE_KERNELS_ISA")) return test_all_levels(argv[0]);
  using A = Activation;
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    test_layer({40, 64, 4, 80, 96, 48, dtype, A::kSwiGLU, 1}, 2, "mixed");
    test_layer({37, 33, 5, 111, 50, 17, dtype, A::kSwiGLU, 1}, 3, "mixed");   // nothing is a multiple of a vector
    test_layer({60, 48, 6, 120, 40, 0, dtype, A::kGELU, 1}, 2, "mixed");      // no shared expert
    test_layer({19, 40, 7, 38, 24, 8, dtype, A::kSwiGLU, 1}, 2, "skewed");    // all tokens to two experts, five empty
    test_layer({1, 16, 3, 1, 8, 8, dtype, A::kSwiGLU, 1}, 1, "mixed");        // one token
    test_layer({0, 16, 3, 0, 8, 8, dtype, A::kSwiGLU, 1}, 1, "mixed");        // no token at all
    test_layer({600, 24, 2, 600, 600, 0, dtype, A::kSwiGLU, 1}, 1, "mixed");  // K longer than one chunk, both ways
  }
  for (int64_t E : {3, 8, 13}) test_gating(50, 37, E, 2);
  test_expert_choice();
  test_half();
  Plan plan(1, 2, 1);
  const int32_t outside = 2;
  const float one = 1;
  expect_error([&] { dispatch_fwd(1, 1, 2, &outside, &one, plan.out()); }, "dispatch: id outside [0, E)");
  expect_error([] { Workspace(128).take<float>(1 << 24); }, "workspace: more than leased");
  expect(peak_gflops(Dtype::kFloat32, 1, 0.001) > 0, "peak");
  release_workspace();
  expect(workspace_bytes() == 0, "workspace released");
  std::printf("%s: %d passed, %d failed\n", kernels().name, passed, failed);
  return failed ? 1 : 0;
}
