#include "dispatch.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "../core/error.h"
#include "../core/threads.h"
#include "order.h"

namespace moe {
namespace {

void token_rows_from_rows(int64_t T, int64_t R, const PlanOut& plan) {
  std::fill(plan.token_row_offsets, plan.token_row_offsets + T + 1, 0);
  for (int64_t r = 0; r < R; ++r) ++plan.token_row_offsets[plan.row_token[r] + 1];
  std::partial_sum(plan.token_row_offsets, plan.token_row_offsets + T + 1, plan.token_row_offsets);
  std::vector<int32_t> next(plan.token_row_offsets, plan.token_row_offsets + T);
  for (int64_t r = 0; r < R; ++r) plan.token_rows[next[plan.row_token[r]]++] = int32_t(r);
}

void offsets_from_counts(int64_t E, const PlanOut& plan) {
  plan.expert_offsets[0] = 0;
  std::partial_sum(plan.expert_counts, plan.expert_counts + E, plan.expert_offsets + 1);
}

int64_t count_from(const std::vector<int32_t>& keys, int32_t bound) {
  int32_t count = 0;
  for (int32_t key : keys) count += key >= bound;
  return count;
}

// A bound that the k largest keys reach and no others, unless they tie with the k-th, which is then the bound: bit by
// bit the largest bound that k keys reach. No branch depends on a single score.
int32_t bound_of_largest(const std::vector<int32_t>& keys, int64_t k) {
  int64_t reached = count_from(keys, 0);
  int32_t bound = reached >= k ? 0 : INT32_MIN;
  for (int32_t step = 1 << 30; step > 0 && reached != k; step >>= 1) {
    reached = count_from(keys, bound + step);
    if (reached >= k) bound += step;
  }
  return bound;
}

}  // namespace

void dispatch_fwd(int64_t T, int64_t K, int64_t E, const int32_t* topk_ids, const float* topk_weights,
                  const PlanOut& plan) {
  std::fill(plan.expert_counts, plan.expert_counts + E, 0);
  for (int64_t i = 0; i < T * K; ++i) {
    MOE_CHECK(topk_ids[i] >= 0 && topk_ids[i] < E, "topk_ids: ", topk_ids[i], " at token ", i / K, ", expected 0..",
              E - 1);
    ++plan.expert_counts[topk_ids[i]];
  }
  offsets_from_counts(E, plan);
  std::vector<int32_t> next(plan.expert_offsets, plan.expert_offsets + E);
  for (int64_t i = 0; i < T * K; ++i) {
    const int32_t row = next[topk_ids[i]]++;
    plan.row_token[row] = int32_t(i / K);
    plan.row_pick[row] = int32_t(i);
    plan.row_weight[row] = topk_weights[i];
  }
  token_rows_from_rows(T, T * K, plan);
}

void dispatch_expert_choice_fwd(int64_t T, int64_t E, int64_t capacity, int64_t tokens_per_group,
                                const float* affinities, int threads, const PlanOut& plan) {
  const int64_t groups = tokens_per_group > 0 ? T / tokens_per_group : 0, per_expert = groups * capacity;
  std::fill(plan.expert_counts, plan.expert_counts + E, int32_t(per_expert));
  offsets_from_counts(E, plan);
  parallel_tasks(threads, E * groups, [&](int64_t task, int) {
    const int64_t e = task / groups, first = task % groups * tokens_per_group;
    thread_local std::vector<int32_t> keys;
    keys.resize(tokens_per_group);
    for (int64_t i = 0; i < tokens_per_group; ++i) keys[i] = order_key(affinities[(first + i) * E + e]);
    const int32_t bound = bound_of_largest(keys, capacity);
    int64_t ties = capacity - std::count_if(keys.begin(), keys.end(), [bound](int32_t key) { return key > bound; });
    int64_t row = e * per_expert + task % groups * capacity;
    for (int64_t i = 0; i < tokens_per_group; ++i) {
      if (keys[i] < bound || (keys[i] == bound && ties-- <= 0)) continue;
      const int64_t token = first + i, pick = token * E + e;
      plan.row_token[row] = int32_t(token);
      plan.row_pick[row] = int32_t(pick);
      plan.row_weight[row++] = affinities[pick];
    }
  });
  token_rows_from_rows(T, E * per_expert, plan);
}

void dispatch_mask_fwd(int64_t T, int64_t E, int64_t R, const float* weights, const uint8_t* picks,
                       const PlanOut& plan) {
  const auto each_pick = [&](const auto& body) {  // tokens, and experts of a token, ascending; most bytes are zero
    const int64_t count = T * E;
    for (int64_t i = 0; i < count;) {
      uint64_t eight = 0;
      std::memcpy(&eight, picks + i, size_t(std::min<int64_t>(8, count - i)));
      for (int64_t j = i; eight; ++j, eight >>= 8)
        if (eight & 0xFF) body(j);
      i += 8;
    }
  };
  std::fill(plan.expert_counts, plan.expert_counts + E, 0);
  each_pick([&](int64_t pick) { ++plan.expert_counts[pick % E]; });
  offsets_from_counts(E, plan);
  MOE_CHECK(plan.expert_offsets[E] <= R, "picks: ", plan.expert_offsets[E], " marks, expected at most ", R);
  std::vector<int32_t> next(plan.expert_offsets, plan.expert_offsets + E);
  int64_t token = 0, rows = 0;
  plan.token_row_offsets[0] = 0;
  each_pick([&](int64_t pick) {
    for (; token < pick / E; ++token) plan.token_row_offsets[token + 1] = int32_t(rows);
    const int32_t row = next[pick % E]++;
    plan.row_token[row] = int32_t(token);
    plan.row_pick[row] = int32_t(pick);
    plan.row_weight[row] = weights[pick];
    plan.token_rows[rows++] = row;
  });
  for (; token < T; ++token) plan.token_row_offsets[token + 1] = int32_t(rows);
  for (; rows < R; ++rows) {
    plan.row_token[rows] = 0;
    plan.row_pick[rows] = int32_t(T * E);
    plan.row_weight[rows] = 0;
    plan.token_rows[rows] = int32_t(rows);
  }
}

}  // namespace moe
