#include "selection.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../core/threads.h"
#include "../core/workspace.h"
#include "order.h"

namespace moe {
namespace {

constexpr int64_t kTogether = 16;   // columns that are gathered at once: a cache line of scores
constexpr int64_t kGrain = 1 << 15;  // scores that are worth a thread
constexpr int kDigit = 11;           // bits; 2048 counters lie in the first cache

// Picked are the keys above bound, and those that equal it at places up to last.
struct Limit {
  int32_t bound, last;
};

// The k-th largest of n > 0 keys, 1 <= k <= n, digit by digit: counted are only the keys that have all the digits so
// far, which move to the front of `keys`. Leaves how many equal it, and in k how many of those are picked.
int32_t kth_largest(uint32_t* keys, int64_t n, int64_t& k, int64_t& equal) {
  int32_t counts[1 << kDigit];
  uint32_t digit = 0;
  for (int shift = 32; shift > 0;) {
    const int width = std::min(shift, kDigit);
    shift -= width;
    const uint32_t mask = (1u << width) - 1;
    std::fill(counts, counts + mask + 1, 0);
    for (int64_t i = 0; i < n; ++i) ++counts[keys[i] >> shift & mask];
    for (digit = mask; counts[digit] < k; --digit) k -= counts[digit];
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = keys[i];
      keys[kept] = key;
      kept += (key >> shift & mask) == digit;
    }
    n = kept;
  }
  equal = n;
  return signed_key(keys[0]);
}

Limit limit_of(uint32_t* keys, const float* column, int64_t M, int64_t N, int64_t k, float* least) {
  *least = INFINITY;
  if (k <= 0 || M == 0) return {INT32_MAX, -1};
  int64_t equal = 0;
  const int32_t bound = kth_largest(keys, M, k, equal);
  *least = score_of(bound);
  if (k == equal) return {bound, INT32_MAX};
  int64_t place = -1;
  while (k > 0) k -= order_key(column[++place * N]) == bound;
  return {bound, int32_t(place)};
}

inline uint8_t taken(float score, int32_t bound, int32_t last, int32_t place) {
  const int32_t key = order_key(score);
  return uint8_t((key > bound) | ((key == bound) & (place <= last)));
}

}  // namespace

void select_top(int64_t G, int64_t M, int64_t N, const float* scores, const int32_t* counts, int64_t count, int threads,
                uint8_t* picks, float* least) {
  std::vector<int32_t> bound(G * N), last(G * N);
  const int64_t blocks = (N + kTogether - 1) / kTogether, width = std::min(N, kTogether);
  parallel_tasks(threads, G * blocks, [&](int64_t task, int) {
    const int64_t g = task / blocks, first = task % blocks * kTogether, n = std::min(width, N - first);
    const float* block = scores + g * M * N + first;
    Workspace memory(Workspace::padded(M * width * 4));
    uint32_t* keys = memory.take<uint32_t>(M * width);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t j = 0; j < n; ++j) keys[j * M + m] = unsigned_key(block[m * N + j]);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t at = g * N + first + j, k = std::min<int64_t>(counts ? counts[at] : count, M);
      const Limit limit = limit_of(keys + j * M, block + j, M, N, k, least + at);
      bound[at] = limit.bound, last[at] = limit.last;
    }
  });
  parallel_ranges(threads, G * M, std::max<int64_t>(1, kGrain / std::max<int64_t>(N, 1)),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t row = begin; row < end;) {
                      const int64_t g = row / M, rows = std::min(end, (g + 1) * M) - row;
                      const int32_t place = int32_t(row - g * M), *bounds = &bound[g * N], *lasts = &last[g * N];
                      const float* from = scores + row * N;
                      uint8_t* to = picks + row * N;
                      if (N == 1)
                        for (int32_t i = 0; i < rows; ++i) to[i] = taken(from[i], bounds[0], lasts[0], place + i);
                      else
                        for (int32_t i = 0; i < rows; ++i)
                          for (int64_t j = 0; j < N; ++j)
                            to[i * N + j] = taken(from[i * N + j], bounds[j], lasts[j], place + i);
                      row += rows;
                    }
                  });
}

namespace {

// Keep the best `count` of what is offered in turn, in descending order, the first among equals.
struct Best {
  int32_t* keys;
  int32_t* ids;
  int64_t count, held = 0;

  void offer(int32_t key, int32_t id) {
    if (held == count && key <= keys[count - 1]) return;
    int64_t place = held < count ? held++ : count - 1;
    for (; place > 0 && key > keys[place - 1]; --place) keys[place] = keys[place - 1], ids[place] = ids[place - 1];
    keys[place] = key, ids[place] = id;
  }
};

// The sum of a group's two largest scores.
float worth(const float* scores, int64_t size) {
  int32_t first = INT32_MIN, second = INT32_MIN;
  for (int64_t i = 0; i < size; ++i) {
    const int32_t key = order_key(scores[i]);
    second = std::max(second, std::min(first, key));
    first = std::max(first, key);
  }
  return size == 1 ? score_of(first) : score_of(first) + score_of(second);
}

}  // namespace

void select_experts(int64_t T, int64_t E, int64_t K, int64_t groups, int64_t groups_taken, const float* scores,
                    int threads, int32_t* ids) {
  const int64_t size = E / groups;
  const int32_t outside = order_key(-INFINITY);
  parallel_ranges(threads, T, kGrain / E + 1, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> keys(std::max(K, groups_taken)), best_groups(groups_taken), allowed(groups);
    for (int64_t t = begin; t < end; ++t) {
      const float* row = scores + t * E;
      if (groups_taken < groups) {
        Best best{keys.data(), best_groups.data(), groups_taken};
        for (int64_t g = 0; g < groups; ++g) best.offer(order_key(worth(row + g * size, size)), int32_t(g));
        std::fill(allowed.begin(), allowed.end(), 0);
        for (const int32_t g : best_groups) allowed[g] = 1;
      } else {
        std::fill(allowed.begin(), allowed.end(), 1);
      }
      Best best{keys.data(), ids + t * K, K};
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t e = g * size; e < (g + 1) * size; ++e)
          best.offer(allowed[g] ? order_key(row[e]) : outside, int32_t(e));
    }
  });
}

}  // namespace moe
