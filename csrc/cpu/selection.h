// Which scores are picked, by rules that need a pass over all of them; of equal scores the first, NaN is the largest.
#pragma once
#include <cstdint>

namespace moe {

// scores (G, M, N). picks[g, m, n] = scores[g, m, n] is among the k largest of scores[g, :, n], k = counts[g, n], or
// `count` where counts is null, clamped to [0, M]; least (G, N): the smallest that is picked, infinity where none is.
void select_top(int64_t G, int64_t M, int64_t N, const float* scores, const int32_t* counts, int64_t count, int threads,
                uint8_t* picks, float* least);

// scores (T, E) -> ids (T, K), by descending score. A group of E / groups experts is worth the sum of its two largest
// scores; outside of the `groups_taken` best groups scores count as minus infinity.
void select_experts(int64_t T, int64_t E, int64_t K, int64_t groups, int64_t groups_taken, const float* scores,
                    int threads, int32_t* ids);

}  // namespace moe
