// Standalone test of the kernels of csrc/cuda, which run here on a CPU, a fiber per thread (fibers.h): every one
// against double-precision loops, at the sizes that have bitten others, in three orders of the threads.
#include "../cuda/combine.h"
#include "../cuda/dispatch.h"
#include "../cuda/expert_choice.h"
#include "../cuda/products.h"
#include "../cuda/selection.h"
#include "../cuda/sums.h"
#include "../cuda/waves.h"
#include "cuda_test_experts.h"
#include "cuda_test_router.h"
#include "selection_test.h"

namespace {

Plan plan_by_loops(int64_t T, int64_t K, int64_t E, const Ints& ids, const Floats& weights) {
  Plan plan(T, E, T * K);
  std::fill(plan.counts.begin(), plan.counts.end(), 0);
  std::vector<Ints> rows_of(T);
  int32_t row = 0;
  for (int64_t e = 0; e < E; ++e) {
    plan.offsets[e] = row;
    for (int64_t i = 0; i < T * K; ++i) {
      if (std::clamp<int64_t>(ids[i], 0, E - 1) != e) continue;
      plan.row_token[row] = int32_t(i / K), plan.row_pick[row] = int32_t(i), plan.row_weight[row] = weights[i];
      rows_of[i / K].push_back(row++);
      ++plan.counts[e];
    }
  }
  plan.offsets[E] = row;
  plan.take_tokens_rows(rows_of);
  return plan;
}

void test_dispatch(int64_t T, int64_t K, int64_t E, const std::string& routing) {
  const std::string name = label("dispatch", Dtype::kFloat32, T, K, E) + " " + routing;
  Ints ids(size_t(T * K));
  for (int64_t i = 0; i < T * K; ++i) {
    if (routing == "one expert") ids[i] = int32_t(i % K);
    if (routing == "random") ids[i] = int32_t((rng() % uint64_t(E)));
    if (routing == "distinct") ids[i] = int32_t((i / K * 7 + i % K * 3) % E);
    if (routing == "outside") ids[i] = int32_t(rng() % uint64_t(3 * E)) - int32_t(E);
  }
  const Floats weights = random_values(T * K, 1, Dtype::kFloat32);
  Plan plan(T, E, T * K);
  Ints workspace(size_t(cuda::dispatch_workspace_bytes(T, K, E) / 4), -7);
  cuda::dispatch_fwd(T, K, E, ids.data(), weights.data(), plan.out(), workspace.data(), nullptr);
  expect(plan == plan_by_loops(T, K, E, ids, weights), name);

  for (const int64_t count : {T * K, T * K + 5}) {  // every pick has a row; some have none
    Floats out = poisoned(count), want(size_t(count), 0.f);
    for (int64_t r = 0; r < T * K; ++r) want[plan.row_pick[r]] = weights[r];
    cuda::dispatch_bwd(T * K, count, weights.data(), plan.row_pick.data(), out.data(), nullptr);
    expect(out == want, name + " backward");
  }
}

// Every expert's tokens of each group from a stable sort, NaN first; then the rows as those of dispatch, from pairs.
Plan choice_by_loops(int64_t T, int64_t E, int64_t C, int64_t G, const Floats& affinities) {
  Plan plan(T, E, E * (T / G) * C);
  std::vector<Ints> rows_of(T);
  int32_t row = 0;
  for (int64_t e = 0; e < E; ++e) {
    plan.offsets[e] = row, plan.counts[e] = int32_t(T / G * C);
    for (int64_t first = 0; first < T; first += G) {
      Ints tokens(static_cast<size_t>(G));
      std::iota(tokens.begin(), tokens.end(), int32_t(first));
      const auto before = [&](int32_t a, int32_t b) {
        const float of_a = affinities[a * E + e], of_b = affinities[b * E + e];
        return of_a > of_b || (std::isnan(of_a) && !std::isnan(of_b));
      };
      std::stable_sort(tokens.begin(), tokens.end(), before);
      std::sort(tokens.begin(), tokens.begin() + C);
      for (int64_t c = 0; c < C; ++c) {
        const int64_t pick = tokens[c] * E + e;
        plan.row_token[row] = tokens[c], plan.row_pick[row] = int32_t(pick), plan.row_weight[row] = affinities[pick];
        rows_of[tokens[c]].push_back(row++);
      }
    }
  }
  plan.offsets[E] = row;
  plan.take_tokens_rows(rows_of);
  return plan;
}

void test_expert_choice(int64_t T, int64_t E, int64_t C, int64_t G, const std::string& values) {
  const std::string name = label("expert choice", Dtype::kFloat32, T, E, C, G) + " " + values;
  Floats affinities = random_values(T * E, 1, Dtype::kFloat32);
  for (float& v : affinities) {
    if (values == "equal") v = 0.125f;
    if (values == "few") v = std::trunc(2 * v);  // zeros of both signs
    if (values == "tiny") v *= 1e-39f;           // no normal numbers
    if (values == "not finite" && v < 0) v = v < -1 ? (v < -1.5f ? INFINITY : -INFINITY) : v < -0.5f ? NAN : -NAN;
  }
  Plan plan(T, E, E * (T / G) * C), want = choice_by_loops(T, E, C, G, affinities);
  Ints workspace(size_t(cuda::dispatch_expert_choice_workspace_bytes(T, E) / 4), -7);
  cuda::dispatch_expert_choice_fwd(T, E, C, G, affinities.data(), plan.out(), workspace.data(), nullptr);
  bool same = true;  // bit by bit: zeros have signs, and NaN does not equal itself
  for (size_t r = 0; r < want.row_weight.size(); ++r)
    same &= std::memcmp(&plan.row_weight[r], &want.row_weight[r], sizeof(float)) == 0;
  plan.row_weight = want.row_weight = {};
  expect(same && plan == want, name);
}

void test_selection() {
  const auto workspace = [](int64_t bytes) { return Ints(size_t(bytes / 4), -7); };
  test_select_top(
      [&](int64_t G, int64_t M, int64_t N, auto* scores, auto* counts, int64_t count, auto* picks, auto* least) {
        Ints memory = workspace(cuda::select_top_workspace_bytes(G, M, N));
        cuda::select_top(G, M, N, scores, counts, count, picks, least, memory.data(), nullptr);
      });
  test_select_experts([](int64_t T, int64_t E, int64_t K, int64_t groups, int64_t taken, auto* scores, auto* ids) {
    cuda::select_experts(T, E, K, groups, taken, scores, ids, nullptr);
  });
  test_plan_of_marks(true, [&](int64_t T, int64_t E, int64_t R, auto* weights, auto* picks, const PlanOut& plan) {
    Ints memory = workspace(cuda::dispatch_mask_workspace_bytes(T, E));
    cuda::dispatch_mask_fwd(T, E, R, weights, picks, plan, memory.data(), nullptr);
  });
}

// Tokens with 0 to `most` rows, as expert choice gives them.
struct Rows {
  int64_t R = 0;
  Ints offsets{0}, rows, row_token;
  Floats weight;
  Rows(int64_t T, int64_t most) {
    std::vector<int32_t> owners;
    for (int64_t t = 0; t < T; ++t) owners.insert(owners.end(), rng() % uint64_t(most + 1), int32_t(t));
    std::shuffle(owners.begin(), owners.end(), rng);
    row_token = owners, R = int64_t(owners.size());
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t r = 0; r < R; ++r)
        if (owners[r] == t) rows.push_back(int32_t(r));
      offsets.push_back(int32_t(rows.size()));
    }
    weight = random_values(R, 1, Dtype::kFloat32);
  }
};

struct CombineCase {
  int64_t T, H, most, num_parts, B;
  bool weighted, shared;
  Dtype dtype, residual_dtype;
  float scale;
};

void test_combine(const CombineCase& c) {
  const std::string name = label("combine", c.dtype, c.T, c.H, c.most, c.num_parts, c.B) + name_of(c.residual_dtype);
  const Rows plan(c.T, c.most);
  const Dtype out_dtype = c.B ? c.residual_dtype : c.dtype;
  const Floats rows = random_values(plan.R * c.H, c.scale, c.dtype);
  const Floats shared = random_values(c.T * c.H, c.scale, c.dtype);
  const Floats residual = random_values(c.T * c.H, c.scale, out_dtype), gate = random_values(c.B * c.H, 1, out_dtype);
  const Floats parts = random_values(plan.R * c.num_parts, c.scale, Dtype::kFloat32);
  Buffer brows(c.dtype, rows), bshared(c.dtype, shared), out(out_dtype, c.T * c.H), bresidual(out_dtype, residual),
      bgate(out_dtype, gate), y(c.dtype, c.T * c.H);
  Floats drow_weight = poisoned(plan.R);
  cuda::CombineArgs a{};
  a.T = c.T, a.H = c.H, a.dtype = c.dtype, a.rows = brows.data(), a.out = out.data();
  a.token_row_offsets = plan.offsets.data(), a.token_rows = plan.rows.data();
  if (c.weighted) a.row_weight = plan.weight.data();
  if (c.shared) a.shared = bshared.data();
  if (c.B) a.residual = bresidual.data(), a.gate = bgate.data(), a.residual_dtype = a.gate_dtype = out_dtype, a.B = c.B;
  if (c.B) a.y = y.data();
  if (c.num_parts) a.parts = parts.data(), a.num_parts = c.num_parts, a.drow_weight = drow_weight.data();
  cuda::combine_fwd(a, nullptr);

  Doubles want(size_t(c.T * c.H)), want_out(want), want_drow(plan.R);
  for (int64_t t = 0; t < c.T; ++t)
    for (int64_t h = 0; h < c.H; ++h) {
      double& sum = want[t * c.H + h];
      for (int32_t j = plan.offsets[t]; j < plan.offsets[t + 1]; ++j)
        sum += (c.weighted ? plan.weight[plan.rows[j]] : 1.0) * rows[plan.rows[j] * c.H + h];
      if (c.shared) sum += shared[t * c.H + h];
      want_out[t * c.H + h] = c.B ? residual[t * c.H + h] + gate[t / (c.T / c.B) * c.H + h] * sum : sum;
    }
  expect_close(out.floats(), want_out, out_dtype, name + " out");
  if (c.B) expect_close(y.floats(), want, c.dtype, name + " y");
  for (int64_t i = 0; i < plan.R * c.num_parts; ++i) want_drow[i / c.num_parts] += parts[i];
  if (c.num_parts) expect_close(drow_weight, want_drow, Dtype::kFloat32, name + " drow_weight");
}

void test_combine_bwd(int64_t T, int64_t H, Dtype dtype, float scale) {
  const std::string name = label("combine_bwd", dtype, T, H);
  const Rows plan(T, 3);
  const Floats dout = random_values(T * H, scale, dtype), y = random_values(plan.R * H, scale, dtype);
  Buffer bdout(dtype, dout), by(dtype, y), dy(dtype, y.size());
  Floats drow = poisoned(plan.R);
  cuda::combine_bwd(plan.R, H, dtype, plan.row_token.data(), plan.weight.data(), bdout.data(), by.data(), dy.data(),
                    drow.data(), nullptr);
  Doubles want(y.size()), want_drow(plan.R);
  for (int64_t i = 0; i < plan.R * H; ++i) {
    const double gradient = dout[plan.row_token[i / H] * H + i % H];
    want[i] = plan.weight[i / H] * gradient, want_drow[i / H] += gradient * y[i];
  }
  expect_close(dy.floats(), want, dtype, name + " dy_rows");
  expect_close(drow, want_drow, Dtype::kFloat32, name + " drow_weight");
}

void test_gated_residual_bwd(int64_t B, int64_t L, int64_t H, Dtype dtype, Dtype y_dtype, float scale) {
  const std::string name = label("gated_residual_bwd", dtype, B, L, H) + name_of(y_dtype);
  const int64_t T = B * L;
  const Floats dout = random_values(T * H, scale, dtype), y = random_values(T * H, 1, y_dtype);
  const Floats gate = random_values(B * H, 1, dtype);
  Buffer bdout(dtype, dout), by(y_dtype, y), bgate(dtype, gate), dy(y_dtype, T * H), dgate(dtype, B * H);
  Buffer workspace(Dtype::kFloat32, cuda::gated_residual_bwd_workspace_bytes(B, T, H) / 4);
  cuda::gated_residual_bwd(B, T, H, dtype, y_dtype, dtype, bdout.data(), by.data(), bgate.data(), dy.data(),
                           dgate.data(), workspace.data(), nullptr);
  Doubles want(size_t(T * H)), want_dgate(size_t(B * H));
  for (int64_t i = 0; i < T * H; ++i) {
    const int64_t b = i / H / L * H + i % H;
    want[i] = double(gate[b]) * dout[i], want_dgate[b] += double(dout[i]) * y[i];
  }
  expect_close(dy.floats(), want, y_dtype, name + " dy");
  expect_close(dgate.floats(), want_dgate, dtype, name + " dgate");
}

void test_sums() {
  for (const Dtype dtype : kDtypes)
    for (const int64_t count : {0, 1, 8, 9, 100})
      for (const int64_t n : {1, 33, 300, 1024}) {
        const Floats partials = random_values(count * n, 1, Dtype::kFloat32);
        Buffer out(dtype, n);
        cuda::ordered_sum(partials.data(), count, n, out.data(), dtype, nullptr);
        Doubles want(n);
        for (int64_t i = 0; i < count * n; ++i) want[i % n] += partials[i];
        expect_close(out.floats(), want, dtype, label("ordered_sum", dtype, count, n));
      }
}

// Every tile of every group exactly once, and as many as count() says.
template <class Tiles>
void test_tiles(const Tiles& tiles, int E, int num_m_of_shared, const std::string& name) {
  std::vector<std::array<int, 4>> seen;
  int count = 0;
  std::vector<int> table(Tiles::table_size(E));
  fibers::launch(dim3(1), 64, 0, [&] {
    tiles.template prepare<128>(table.data());
    if (threadIdx.x != 0) return;
    count = tiles.template count<128>(table.data());
    for (int index = 0; index < count; ++index) {
      const cuda::Tile tile = tiles.template locate<128>(table.data(), index);
      seen.push_back({tile.group, tile.part, tile.m, tile.n});
    }
  });
  std::sort(seen.begin(), seen.end());
  expect(std::adjacent_find(seen.begin(), seen.end()) == seen.end(), name + " twice");
  std::vector<std::array<int, 4>> want;
  for (int e = 0; e <= E; ++e) {
    const bool shared = e == E;
    int num_m, num_n, parts = 1;
    if constexpr (std::is_same_v<Tiles, cuda::RowTiles>) {
      num_m = int(cuda::ceil_div(tiles.groups.rows(e), 128)), num_n = shared ? tiles.shared_num_n : tiles.num_n;
    } else {
      num_m = shared ? num_m_of_shared : tiles.num_m, num_n = shared ? tiles.shared_num_n : tiles.num_n;
      parts = shared ? tiles.shared_split : tiles.split;
    }
    for (int part = 0; part < parts; ++part)
      for (int m = 0; m < num_m; ++m)
        for (int n = 0; n < num_n; ++n) want.push_back({e, part, m, n});
  }
  std::sort(want.begin(), want.end());
  expect(seen == want, name + " not the tiles of the groups");
}

void test_schedules() {
  for (const std::vector<int>& rows : std::vector<std::vector<int>>{
           {0}, {1}, {0, 0, 0}, {128, 0, 129}, {0, 5, 0, 1000, 0}, {1300, 0, 0}, {127, 128, 129, 1, 0, 255, 256}}) {
    Ints offsets{0};
    for (const int count : rows) offsets.push_back(offsets.back() + count);
    const int E = int(rows.size());
    for (const int T : {0, 1, 300, 2000}) {
      const cuda::Groups groups{E, T, offsets.data()};
      for (const auto& [n, shared_n] : std::vector<std::array<int, 2>>{{1, 1}, {3, 2}, {24, 12}}) {
        const std::string name = label("tiles", Dtype::kInt32, E, T, n, offsets.back());
        test_tiles(cuda::RowTiles{groups, n, T ? shared_n : 0}, E, 0, "row " + name);
        test_tiles(cuda::WeightTiles{groups, 9, n, 2, T ? 5 : 0, T ? shared_n : 0, 6}, E, T ? 5 : 0, "weight " + name);
      }
    }
  }
}

// What the busiest block does, against blocks that take their tiles one by one.
void test_busiest() {
  for (const int blocks : {1, 3, 132})
    for (const int64_t m : {0, 1, 11, 132, 300})
      for (const int64_t shared_m : {0, 1, 64, 131})
        for (const int64_t columns : {0, 100, 384, 1152})
          for (const double cost : {0.5, 1.0, 3.0}) {
            const cuda::Areas areas{{{m, columns, 2.0}, {shared_m, columns, cost}}};
            std::vector<double> load(blocks);
            const int64_t first = m * cuda::ceil_div(columns, 192),
                          all = first + shared_m * cuda::ceil_div(columns, 192);
            for (int64_t tile = 0; tile < all; ++tile) load[tile % blocks] += tile < first ? 2.0 : cost;
            const double want = *std::max_element(load.begin(), load.end());
            expect(cuda::busiest(areas, 192, blocks) == want,
                   label("busiest", Dtype::kInt32, m, shared_m, columns, blocks));
          }
}

__global__ void wait_but_for(unsigned thread) {
  if (threadIdx.x != thread) cuda::take_turn();
}

// A kernel that one thread leaves without having waited is refused.
void test_waiting() {
  for (const unsigned thread : {0, 33, 64}) {
    std::string said;
    try {
      cuda::launch(wait_but_for, dim3(2), 64, 0, nullptr, thread);
    } catch (const std::exception& error) {
      said = error.what();
    }
    const std::string want = "thread " + std::to_string(thread) + " ends without wait_for_predecessor";
    expect(said == (thread < 64 ? want : ""), "waiting but for " + std::to_string(thread) + ": '" + said + "'");
  }
}

void test_all(Dtype dtype) {
  struct Shape {
    int64_t T, H, E, K;
    float scale;
  };
  for (const auto& [T, H, E, K, scale] : {
           Shape{0, 16, 4, 2, 1},          // no token
           {1, 8, 1, 1, 1},                // one token, one expert, the narrowest row
           {3, 24, 5, 5, 0.1f},            // T < tile, K = E, E not a power of two
           {37, 136, 8, 2, 0.3f},          // ragged T, a row longer than a warp's step by 8
           {40, 40, 16, 0, 0.3f},          // affinities only
           {150, 520, 17, 3, 1e-3f},       // three chunks, two blocks of columns, one expert too many for a block
           {70, 16, 64, 8, 1.f},           //
           {9, 16, 300, 7, 3.f},           // more experts than a tile of 32 tokens holds
           {2051, 8, 8, 2, 1.f},           // four tokens a warp
           {16389, 8, 8, 2, 1.f},          // eight
           {2049, 8, 20, 3, 10.f},         //
       })
    test_gating(T, H, E, K, dtype, scale);
  test_ties(dtype);
  test_not_finite(7, 5, dtype);
  test_not_finite(2050, 11, dtype);

  for (const float scale : {1e-3f, 1.f, 30.f}) {
    test_combine({5, 8, 4, 0, 0, true, false, dtype, dtype, scale});
    test_combine({33, 40, 9, 5, 0, false, true, dtype, dtype, scale});  // more rows than loaded together
    test_combine_bwd(21, 264, dtype, scale);
  }
  test_combine({3, 2112, 2, 0, 0, true, true, dtype, dtype, 1});    // a row for two blocks
  test_combine({4, 16, 0, 3, 0, true, false, dtype, dtype, 1});     // no row at all
  test_combine({0, 16, 2, 0, 0, true, false, dtype, dtype, 1});
  test_combine({300, 8, 2, 40, 0, true, false, dtype, dtype, 1});   // parts of more tokens than a block has threads
  test_combine_bwd(0, 16, dtype, 1);
  for (const Dtype outer : kDtypes) {
    test_combine({30, 24, 3, 0, 3, true, true, dtype, outer, 1});
    test_combine({0, 24, 3, 0, 3, true, true, dtype, outer, 1});
    test_gated_residual_bwd(3, 11, 24, outer, dtype, 30);
    test_gated_residual_bwd(2, 0, 24, outer, dtype, 1);
    test_adaln(3, 11, 24, 5, 2, outer, dtype, 1, true);
  }
  test_gated_residual_bwd(1, 700, 8, dtype, dtype, 1e-3f);
  test_gated_residual_bwd(2, 5, 2112, dtype, dtype, 1);
  test_adaln(2, 150, 136, 20, 3, dtype, dtype, 1, false);          // three chunks an image, experts for two blocks
  test_adaln(1, 1, 520, 8, 8, dtype, dtype, 30, true);
  test_adaln(2, 9, 16, 300, 2, dtype, dtype, 30, true);
  test_adaln(2, 0, 16, 4, 2, dtype, dtype, 1, true);
}

// Without MOE_FIBER_ORDER: this program once for every order of the threads.
int test_all_orders(const std::string& program) {
  int failures = 0;
  for (const char* order : {"forward", "reverse", "shuffled"})
    failures += std::system(("MOE_FIBER_ORDER=" + std::string(order) + " '" + program + "'").c_str()) != 0;
  return failures;
}

void test_everything() {
  test_waiting();
  test_sums();
  test_schedules();
  test_busiest();
  for (const Dtype dtype : kDtypes) test_all(dtype);
  test_weights_anywhere();
  for (const char* routing : {"random", "distinct", "one expert", "outside"})
    for (const auto& [T, K, E] : std::vector<std::array<int64_t, 3>>{
             {1, 1, 1}, {2, 2, 3}, {31, 2, 7}, {300, 5, 60}, {129, 8, 8}, {40, 3, 300}, {100, 4, 1000}, {17000, 2, 5}})
      test_dispatch(T, K, E, routing);
  for (const char* values : {"random", "equal", "few", "tiny", "not finite"})
    for (const auto& [T, E, C, G] : std::vector<std::array<int64_t, 4>>{
             {1, 1, 1, 1},           //
             {6, 5, 1, 1},           // groups of a token
             {66, 3, 9, 33},         // a block of two warps, the second with one token
             {96, 9, 32, 32},        // all tokens of a group
             {40, 70, 1, 8},         // one token of a group; many experts
             {3, 300, 2, 3},         // more experts than tokens, and than threads
             {1200, 4, 150, 600},    // groups of three chunks, the last one ragged
             {512, 2, 511, 512},     // all but one
             {8200, 2, 4100, 8200},  // keys in global memory
         })
      test_expert_choice(T, E, C, G, values);
  test_expert_choice(0, 9, 2, 3, "random");
  test_selection();
  test_dispatch(0, 2, 9, "random");
  test_dispatch(7, 0, 9, "random");  // no picks
}

}  // namespace

int main(int, char** argv) {
  const char* order = std::getenv("MOE_FIBER_ORDER");
  if (!order) return test_all_orders(argv[0]);
  try {
    test_everything();
  } catch (const std::exception& error) {  // of the fibers
    expect(false, error.what());
  }
  std::printf("%s: %d passed, %d failed\n", order, passed, failed);
  return failed ? 1 : 0;
}
