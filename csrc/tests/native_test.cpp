// Standalone test of csrc/cpu, so that sanitizers see our code and not Python's: every room against a double-precision
// loop, forward and backward, at awkward sizes, on one and on three threads, at every ISA level (a process each).
#include "native_test.h"
#include "selection_test.h"

namespace {

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// One layer: its inputs, and what a loop in double makes of them.
struct Case {
  MoeSizes s;
  std::string name;
  Plan plan;
  Floats x, dout, up, down, sup, sdown;
  Doubles out, dx, drow, dup, ddown, dsup, dsdown;

  Case(MoeSizes sizes, int64_t K, const std::string& routing) : s(sizes), plan(s.T, s.E, s.R) {
    std::mt19937 rng(7);
    const char* dtypes[] = {" fp32", " bf16", " fp16"};
    name = routing + " T" + std::to_string(s.T) + " H" + std::to_string(s.H) + " I" + std::to_string(s.I) + " Is" +
           std::to_string(s.Is) + " E" + std::to_string(s.E) + dtypes[int(s.dtype)];
    Ints ids(size_t(s.T * K));
    for (int64_t t = 0; t < s.T; ++t)
      for (int64_t k = 0; k < K; ++k)
        ids[t * K + k] = routing == "skewed" ? int32_t(k) : int32_t((t * 7 + k * 3 + t * t) % s.E);
    const Floats weights = random_values(ids.size(), 0.5f, rng);
    dispatch_fwd(s.T, K, s.E, ids.data(), weights.data(), plan.out());
    const int64_t U = s.halves() * s.I, Us = s.halves() * s.Is;
    x = random_values(s.T * s.H, 1, rng), dout = random_values(s.T * s.H, 1, rng);
    up = random_values(s.E * U * s.H, 0.2f, rng), down = random_values(s.E * s.H * s.I, 0.2f, rng);
    sup = random_values(Us * s.H, 0.2f, rng), sdown = random_values(s.H * s.Is, 0.2f, rng);
    out.resize(x.size()), dx.resize(x.size()), drow.resize(s.R), dup.resize(up.size()), ddown.resize(down.size());
    dsup.resize(sup.size()), dsdown.resize(sdown.size());
    const Oracle oracle{s};
    for (int64_t e = 0; e < s.E; ++e)
      for (int64_t r = plan.offsets[e]; r < plan.offsets[e + 1]; ++r) {
        const int64_t t = plan.row_token[r] * s.H;
        drow[r] = oracle.row(&x[t], &up[e * U * s.H], &down[e * s.H * s.I], s.I, plan.row_weight[r], &out[t], &dout[t],
                             &dx[t], &dup[e * U * s.H], &ddown[e * s.H * s.I]);
      }
    for (int64_t t = 0; s.Is > 0 && t < s.T; ++t)
      oracle.row(&x[t * s.H], sup.data(), sdown.data(), s.Is, 1, &out[t * s.H], &dout[t * s.H], &dx[t * s.H],
                 dsup.data(), dsdown.data());
  }

  void set_weights(Placed& w) const {
    w.set_gate_up(w.table.gate, w.table.up, up);
    w.set(w.table.down, down.data());
    if (s.Is > 0) w.set_gate_up(w.table.shared_gate, w.table.shared_up, sup);
    if (s.Is > 0) w.set(w.table.shared_down, sdown.data());
  }
};

// What one forward and one backward have written.
struct Written {
  std::vector<char> out, dx, y_rows, room_dx;
  Floats drow, dup, ddown, dsup, dsdown, room_dup, room_ddown;
  bool operator==(const Written& o) const {
    return same_bits(out, o.out) && same_bits(dx, o.dx) && same_bits(y_rows, o.y_rows) &&
           same_bits(room_dx, o.room_dx) && same_bits(drow, o.drow) && same_bits(dup, o.dup) &&
           same_bits(ddown, o.ddown) && same_bits(dsup, o.dsup) && same_bits(dsdown, o.dsdown) &&
           same_bits(room_dup, o.room_dup) && same_bits(room_ddown, o.room_ddown);
  }
};

// The gradients without some kinds are those with all of them, bit for bit, and the missing ones stay unwritten.
void test_frozen(const Case& c, const ExpertTable& w, const Layout& layout, void* x, void* dout, void* gate_up,
                 void* shared_gate_up, const std::vector<char>& dx, const std::string& where) {
  const auto backward = [&](const ExpertTable& wanted) {
    Buffer again(c.s.dtype, c.x.size());
    Floats drow(c.s.R);
    moe_mlp_bwd(c.s, c.plan.view(), w, x, dout, gate_up, shared_gate_up, again.data(), drow.data(), wanted);
    expect(same_bits(again.bytes, dx), where + " dx, some weights frozen");
  };
  Placed all(c.s, layout);
  backward(all.table);
  for (size_t frozen = 0; frozen <= kKinds.size(); ++frozen) {
    Placed some(c.s, layout);
    ExpertTable wanted = some.table;
    for (size_t k = 0; k < kKinds.size(); ++k)
      if (k == frozen || frozen == kKinds.size()) wanted.*kKinds[k] = {};
    backward(wanted);
    for (const Kind kind : kKinds)
      if ((wanted.*kind).present())
        expect(same_bits(some.values(wanted.*kind), all.values(all.table.*kind)), where + " gradients, others frozen");
    expect(some.nothing_else_written(wanted), where + " frozen: nothing written");
  }
}

Written test_placed(const Case& c, const Layout& layout, const Layout& grad_layout, const std::string& where) {
  const MoeSizes& s = c.s;
  const int64_t U = s.halves() * s.I, Us = s.halves() * s.Is;
  const double limit = s.dtype == Dtype::kFloat32 ? 2e-6 : 1.5e-2;
  const PlanView plan = c.plan.view();
  Placed weights(s, layout), grads(s, grad_layout), room_grads(s, grad_layout);
  c.set_weights(weights);
  const ExpertTable& w = weights.table;
  Buffer bx(s.dtype, c.x), bdout(s.dtype, c.dout), bout(s.dtype, c.x.size()), gate_up(s.dtype, s.R * U),
      shared_gate_up(s.dtype, s.Is ? s.T * Us : 0), bdx(s.dtype, c.x.size()), y_rows(s.dtype, s.R * s.H),
      room_dx(s.dtype, c.x.size()), again(s.dtype, c.x.size());
  Floats drow(s.R, NAN);
  moe_mlp_fwd(s, plan, w, nullptr, bx.data(), bout.data(), gate_up.data(), shared_gate_up.data());
  moe_mlp_bwd(s, plan, w, bx.data(), bdout.data(), gate_up.data(), shared_gate_up.data(), bdx.data(), drow.data(),
              grads.table);
  const ExpertTable& g = grads.table;
  Written got{bout.bytes,
              bdx.bytes,
              {},
              {},
              drow,
              grads.gate_up(g.gate, g.up),
              grads.values(g.down),
              grads.gate_up(g.shared_gate, g.shared_up),
              grads.values(g.shared_down),
              {},
              {}};
  expect(relative_error(bout.floats(), c.out) < limit, where + " out");
  expect(relative_error(bdx.floats(), c.dx) < limit, where + " dx");
  expect(relative_error(drow, c.drow) < limit, where + " drow_weight");
  expect(relative_error(got.dup, c.dup) < limit, where + " dgate_up_proj");
  expect(relative_error(got.ddown, c.ddown) < limit, where + " ddown_proj");
  if (s.Is) expect(relative_error(got.dsup, c.dsup) < limit, where + " dshared_gate_up_proj");
  if (s.Is) expect(relative_error(got.dsdown, c.dsdown) < limit, where + " dshared_down_proj");
  for (int64_t e = 0; e < s.E; ++e)
    if (c.plan.counts[e] == 0)
      expect(std::all_of(&got.dup[e * U * s.H], &got.dup[e * U * s.H] + U * s.H, [](float v) { return v == 0; }),
             where + " exact zeros of an expert without rows");
  expect(grads.nothing_else_written(g), where + " nothing between the rows of gradients written");

  const PackedWeights packed(s, w);
  Placed elsewhere(s, grad_layout);
  c.set_weights(elsewhere);
  moe_mlp_fwd(s, plan, elsewhere.table, &packed, bx.data(), again.data(), nullptr, nullptr);
  expect(same_bits(again.bytes, bout.bytes), where + " the same bits from packed weights");
  if (s.threads > 1)
    test_frozen(c, w, grad_layout, bx.data(), bdout.data(), gate_up.data(), shared_gate_up.data(), bdx.bytes, where);

  MoeSizes routed = s;  // the rooms one by one
  routed.Is = 0;
  experts_fwd(routed, plan, w, bx.data(), y_rows.data(), gate_up.data());
  got.y_rows = y_rows.bytes;
  experts_bwd(routed, plan, w, bx.data(), y_rows.data(), gate_up.data(), room_dx.data(), room_grads.table);
  got.room_dx = room_dx.bytes;
  got.room_dup = room_grads.gate_up(room_grads.table.gate, room_grads.table.up);
  got.room_ddown = room_grads.values(room_grads.table.down);
  if (s.Is == 0) {
    combine_rows({s.T, s.H, s.dtype, s.dtype, s.threads, y_rows.data(), c.plan.row_weight.data(),
                  c.plan.token_row_offsets.data(), c.plan.token_rows.data(), nullptr, again.data()});
    expect(relative_error(again.floats(), c.out) < limit, where + " rooms one by one");
  }
  return got;
}

void test_layer(const MoeSizes& sizes, int64_t K, const std::string& routing) {
  Case c(sizes, K, routing);
  std::vector<Written> all;
  for (size_t i = 0; i < std::size(kLayouts); ++i)
    for (int threads : {1, 3}) {
      c.s.threads = threads;
      const Layout &layout = kLayouts[i], &grad_layout = kLayouts[(i + (threads == 3)) % std::size(kLayouts)];
      const std::string where = c.name + " threads " + std::to_string(threads) + ", " + layout.name;
      all.push_back(test_placed(c, layout, grad_layout, where));
      expect(all.back() == all.front(), where + ": the same bits as stacked, on one thread");
    }
}

void test_changed_weights_are_noticed() {
  const Case c({4, 16, 3, 4, 8, 8, Dtype::kBFloat16, Activation::kSwiGLU, 1}, 1, "mixed");
  for (const Layout& layout : kLayouts)
    for (const Kind kind : kKinds) {
      Placed w(c.s, layout);
      c.set_weights(w);
      const PackedWeights packed(c.s, w.table);
      packed.check(c.s, w.table);
      Floats values = w.values(w.table.*kind);
      for (float& v : values) v *= 2;
      w.set(w.table.*kind, values.data());
      bool noticed = false;
      try {
        packed.check(c.s, w.table);
      } catch (const Error&) {
        noticed = true;
      }
      expect(noticed, "packed weights: a changed weight, " + layout.name);
    }
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
    floats[3 * i] = middle, floats[3 * i + 1] = std::nextafter(middle, value),
               floats[3 * i + 2] = std::nextafter(middle, next);
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
  expect(plan.row_token[0] == 2 && plan.row_token[1] == 5 && plan.row_token[2] == 6,
         "expert choice: lowest tokens win");
  for (int64_t r = 0; r < R; ++r)
    expect(plan.row_weight[r] == affinities[plan.row_pick[r]] && plan.row_pick[r] / E == plan.row_token[r],
           "expert choice: weight and pick");
  expect(plan.token_row_offsets[T] == R, "expert choice: token rows");
}

void test_selection() {
  test_select_top([](int64_t G, int64_t M, int64_t N, auto* scores, auto* counts, int64_t count, auto* picks,
                     auto* least) { select_top(G, M, N, scores, counts, count, 3, picks, least); });
  test_select_experts([](int64_t T, int64_t E, int64_t K, int64_t groups, int64_t taken, auto* scores, auto* ids) {
    select_experts(T, E, K, groups, taken, scores, 3, ids);
  });
  test_plan_of_marks(false, [](int64_t T, int64_t E, int64_t R, auto* weights, auto* picks, const PlanOut& plan) {
    dispatch_mask_fwd(T, E, R, weights, picks, plan);
  });
}

void expect_error(const std::function<void()>& call, const std::string& what) {
  try {
    call();
    expect(false, what + ": no error");
  } catch (const Error&) {
    expect(true, what);
  }
}

void test_blocking() {
  const auto panels = [](int64_t l2_kib) { return blocking_for({32 << 10, l2_kib << 10, 32 << 20}).panel_bytes >> 10; };
  expect(panels(256) == 96 && panels(512) == 192 && panels(1024) == 384, "3/8 of L2");
  expect(panels(1280) == 480 && panels(2048) == 768 && panels(64) == 64 && panels(1 << 16) == 768,
         "3/8 of L2, 64 to 768 KiB");
  const auto wave = [](int64_t l3_mib) { return blocking_for({32 << 10, 1 << 20, l3_mib << 20}).wave_bytes >> 20; };
  expect(wave(2) == 4 && wave(16) == 8 && wave(32) == 16 && wave(260) == 16, "half of L3, 4 to 16 MiB");
  setenv("MOE_KERNELS_CACHES", "48,1280,24576", 1);
  expect(caches().l1 == 48 << 10 && caches().l2 == 1280 << 10 && caches().l3 == 24 << 20, "caches given");
  for (const char* wrong : {"", "32", "32,512", "32;512;1024", "32,-1,1024", "32,512,1024,8", "32,512,1M"}) {
    setenv("MOE_KERNELS_CACHES", wrong, 1);
    expect_error([] { caches(); }, "caches: " + std::string(wrong));
  }
  unsetenv("MOE_KERNELS_CACHES");
  expect(caches().l2 > 0 && caches().l3 > 0, "caches of this machine");
  int64_t part_kib = 0;
  std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> part_kib;
  expect(part_kib <= 0 || caches().l3 == part_kib << 10, "L3 is the part that a core shares, not all of the socket");
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
    test_layer({37, 33, 5, 111, 50, 17, dtype, A::kSwiGLU, 1}, 3, "mixed");  // nothing is a multiple of a vector
    test_layer({60, 48, 6, 120, 40, 0, dtype, A::kGELU, 1}, 2, "mixed");  // no shared expert
    test_layer({23, 35, 4, 46, 21, 13, dtype, A::kGELU, 1}, 2, "mixed");
    test_layer({19, 40, 7, 38, 24, 8, dtype, A::kSwiGLU, 1}, 2, "skewed");  // all tokens to two experts, five empty
    test_layer({1, 16, 3, 1, 8, 8, dtype, A::kSwiGLU, 1}, 1, "mixed");  // one token
    test_layer({0, 16, 3, 0, 8, 8, dtype, A::kSwiGLU, 1}, 1, "mixed");  // no token at all
    test_layer({600, 24, 2, 600, 600, 0, dtype, A::kSwiGLU, 1}, 1, "mixed");  // K longer than one chunk, both ways
  }
  test_changed_weights_are_noticed();
  for (int64_t E : {3, 8, 13}) test_gating(50, 37, E, 2);
  test_expert_choice();
  test_selection();
  test_half();
  test_blocking();
  Plan plan(1, 2, 1);
  const int32_t outside = 2;
  const float one = 1;
  expect_error([&] { dispatch_fwd(1, 1, 2, &outside, &one, plan.out()); }, "dispatch: id outside [0, E)");
  const uint8_t marks[] = {1, 1};
  expect_error([&] { dispatch_mask_fwd(1, 2, 1, &one, marks, plan.out()); }, "dispatch: more marks than rows");
  expect_error([] { Workspace(128).take<float>(1 << 24); }, "workspace: more than leased");
  expect(peak_gflops(Dtype::kFloat32, 1, 0.001) > 0, "peak");
  release_workspace();
  expect(workspace_bytes() == 0, "workspace released");
  std::printf("%s: %d passed, %d failed\n", kernels().name, passed, failed);
  return failed ? 1 : 0;
}
