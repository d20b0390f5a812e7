// Selection by any device's kernels against loops: ties, infinities, NaN, zeros of both signs; behind native_test.h or
// cuda_test.h, whose plans and counts of what passed it uses.
#pragma once
#include <array>
#include <numeric>

namespace {

constexpr std::array<int64_t, 3> kColumns[] = {{1, 9000, 1}, {3, 40, 1}, {2, 60, 21}, {4, 1, 2}, {2, 0, 3}};

inline bool before(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

inline Floats draw_scores(int64_t count, std::mt19937& rng) {
  const float special[] = {0.f, -0.f, 1.f, INFINITY, -INFINITY, NAN, -NAN, 1e-45f};
  Floats scores(static_cast<size_t>(count));
  for (float& score : scores) score = rng() % 3 ? float(int(rng() % 512)) / 64 - 4 : special[rng() % 8];
  return scores;
}

// Places 0 to count, the best first.
template <class Score>
std::vector<int64_t> ordered(int64_t count, const Score& score) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), int64_t(0));
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return before(score(a), score(b)); });
  return order;
}

// select(G, M, N, scores, counts or null, count, picks, least)
template <class Select>
void test_select_top(const Select& select) {
  std::mt19937 rng(6);
  for (const auto& [G, M, N] : kColumns)
    for (const bool each : {true, false}) {
      const Floats scores = draw_scores(G * M * N, rng);
      std::vector<int32_t> counts(size_t(G * N), int32_t(M / 3));
      if (each)
        for (int32_t& count : counts) count = int32_t(rng() % uint64_t(M + 3)) - 1;
      std::vector<uint8_t> picks(scores.size(), 9);
      Floats least(counts.size(), -7);
      select(G, M, N, scores.data(), each ? counts.data() : nullptr, M / 3, picks.data(), least.data());
      bool same = true;
      for (int64_t c = 0; c < G * N; ++c) {
        const int64_t n = N, first = c / N * M * N + c % N;
        const auto score = [&](int64_t m) { return scores[first + m * n]; };
        const auto order = ordered(M, score);
        const int64_t k = std::max<int64_t>(0, std::min<int64_t>(counts[c], M));
        for (int64_t i = 0; i < M; ++i) same &= picks[first + order[i] * n] == (i < k);
        const float last = k > 0 ? score(order[k - 1]) : INFINITY;
        same &= least[c] == last || (std::isnan(least[c]) && std::isnan(last));
      }
      expect(same, "select_top " + std::to_string(G) + " " + std::to_string(M) + " " + std::to_string(N));
    }
}

// select(T, E, K, groups, taken, scores, ids)
template <class Select>
void test_select_experts(const Select& select) {
  std::mt19937 rng(8);
  for (const auto& [T, E, K, groups, taken] : std::vector<std::array<int64_t, 5>>{
           {30, 8, 3, 4, 2}, {9, 70, 5, 1, 1}, {11, 40, 7, 40, 7}, {5, 6, 6, 2, 1}, {1, 1, 1, 1, 1}, {0, 4, 2, 2, 1}}) {
    const Floats scores = draw_scores(T * E, rng);
    Ints ids(size_t(T * K), -7);
    select(T, E, K, groups, taken, scores.data(), ids.data());
    bool same = true;
    for (int64_t t = 0; t < T; ++t) {
      Floats row(scores.begin() + t * E, scores.begin() + (t + 1) * E), worth;
      const int64_t size = E / groups;
      for (int64_t g = 0; g < groups; ++g) {
        const auto order = ordered(size, [&](int64_t i) { return row[g * size + i]; });
        worth.push_back(row[g * size + order[0]] + (size > 1 ? row[g * size + order[1]] : 0.f));
      }
      const auto best = ordered(groups, [&](int64_t g) { return worth[g]; });
      for (int64_t i = taken; i < groups; ++i) std::fill_n(row.begin() + best[i] * size, size, -INFINITY);
      const auto order = ordered(E, [&](int64_t e) { return row[e]; });
      for (int64_t k = 0; k < K; ++k) same &= ids[t * K + k] == order[k];
    }
    expect(same, "select_experts " + std::to_string(E) + " " + std::to_string(groups));
  }
}

// A plan of marks by loops: of the rows those from R on are dropped, and what is behind them is filled.
inline Plan plan_of_marks(int64_t T, int64_t E, int64_t R, const Floats& weights, const std::vector<uint8_t>& picks) {
  Plan plan(T, E, R);
  std::vector<Ints> rows_of(static_cast<size_t>(T));
  int64_t row = 0;
  for (int64_t e = 0; e < E; ++e) {
    plan.offsets[e] = int32_t(row);
    for (int64_t t = 0; t < T; ++t) {
      if (!picks[t * E + e] || row == R) continue;
      plan.row_token[row] = int32_t(t), plan.row_pick[row] = int32_t(t * E + e);
      plan.row_weight[row] = weights[t * E + e];
      rows_of[t].push_back(int32_t(row++));
    }
    plan.counts[e] = int32_t(row) - plan.offsets[e];
  }
  plan.offsets[E] = int32_t(row);
  for (int64_t t = 0, at = 0; t <= T; ++t) {
    plan.token_row_offsets[t] = int32_t(at);
    if (t == T) break;
    for (const int32_t r : rows_of[t]) plan.token_rows[at++] = r;
  }
  for (; row < R; ++row) {
    plan.row_token[row] = 0, plan.row_pick[row] = int32_t(T * E), plan.row_weight[row] = 0;
    plan.token_rows[row] = int32_t(row);
  }
  return plan;
}

// make(T, E, R, weights, picks, plan): a plan with room for the marks, more or, where they are dropped, less.
template <class Make>
void test_plan_of_marks(bool drops, const Make& make) {
  std::mt19937 rng(9);
  for (const auto& [T, E, one_in] : std::vector<std::array<int64_t, 3>>{
           {1, 1, 1}, {300, 5, 3}, {40, 70, 9}, {5000, 3, 4}, {64, 33, 1}, {50, 4, 1000}, {0, 3, 1}}) {
    Floats weights(size_t(T * E));
    std::vector<uint8_t> picks(weights.size());
    int64_t marks = 0;
    for (size_t i = 0; i < picks.size(); ++i)
      weights[i] = float(i) + 1, picks[i] = rng() % uint64_t(one_in) == 0, marks += picks[i];
    for (const int64_t R : {marks, std::min(marks + 300, T * E), T * E, drops ? marks / 2 : marks}) {
      Plan plan(T, E, R);
      make(T, E, R, weights.data(), picks.data(), plan.out());
      const Plan want = plan_of_marks(T, E, R, weights, picks);
      const bool same = plan.counts == want.counts && plan.offsets == want.offsets &&
                        plan.row_token == want.row_token && plan.row_pick == want.row_pick &&
                        plan.row_weight == want.row_weight && plan.token_rows == want.token_rows &&
                        plan.token_row_offsets == want.token_row_offsets;
      expect(same, "plan of marks " + std::to_string(T) + " " + std::to_string(E) + " " + std::to_string(R));
    }
  }
}

}  // namespace
