// What gating and adaLN share: logits of a few tokens in a warp's registers, softmax and top k; and the way back.
#pragma once
#include <algorithm>

#include "columns.h"
#include "device.h"
#include "gating.h"

namespace moe::cuda {

// Four consecutive elements as one access: with four columns a lane the usual widths are whole steps of a warp, and a
// warp reads 512 consecutive bytes of the fp32 weight.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

template <class T>
__device__ __forceinline__ void load4(const T* from, float (&values)[4]) {
  const Four<T> four = *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = wide(four.at[i]);
}

template <class T>
__device__ __forceinline__ void store4(T* to, const float (&values)[4]) {
  Four<T> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) four.at[i] = narrow<T>(values[i]);
  *reinterpret_cast<Four<T>*>(to) = four;
}

struct Router {
  int64_t T;
  int H, E, K;
  const float* weight;  // (E, H)
  float* probs;
  float* topk_weights;
  int32_t* topk_ids;
};

// Lanes that share a token where a warp has M of them, and how far apart their logits lie: without bank conflicts.
__host__ __device__ constexpr int lanes_per_token(int M) { return kWarp / M; }
__host__ __device__ constexpr int logits_stride(int M, int E) {
  return lanes_per_token(M) * (((E + lanes_per_token(M) - 1) / lanes_per_token(M)) | 1);
}

// Sums over the lanes of `count` values each, count a power of two; sum i ends at values[i % share] of lane
// i / share * repeat, share = max(1, count / 32), repeat = max(1, 32 / count).
template <int count, int distance = kWarp / 2, int n>
__device__ __forceinline__ void sum_across_lanes(float (&values)[n]) {
  if constexpr (distance > 0 && count > 1) {
    const bool upper = (threadIdx.x & distance) != 0;
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      const float low = values[i], high = values[i + count / 2];
      values[i] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, distance);
    }
    sum_across_lanes<count / 2, distance / 2>(values);
  } else if constexpr (distance > 0) {
    values[0] += __shfl_xor_sync(kAllLanes, values[0], distance);
    sum_across_lanes<1, distance / 2>(values);
  }
}

// Four columns of each of a warp's M tokens: as they come from memory, then in fp32.
template <class S, int M>
struct TokenRows {
  using Raw = Four<S>;
  const S* rows[M];

  __device__ __forceinline__ TokenRows(const S* tokens, int64_t first_token, const Router& r) {
#pragma unroll
    for (int m = 0; m < M; ++m) rows[m] = tokens + min(first_token + m, r.T - 1) * r.H;
  }
  __device__ __forceinline__ Raw load(int m, int h) const { return *reinterpret_cast<const Raw*>(rows[m] + h); }
  __device__ __forceinline__ void widen(int, int, const Raw& raw, float (&values)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = wide(raw.at[i]);
  }
};

// logits[m][first + n] = token m . weight[first + n], m < M, n < N. The next columns are loaded ahead.
template <int M, int N, class Source>
__device__ __forceinline__ void router_logits(const Router& r, int first, const Source& source, float* logits) {
  const int lane = threadIdx.x % kWarp, last = r.E - 1 - first;
  const float* weight = r.weight + int64_t(first) * r.H;
  float totals[M * N] = {};
  typename Source::Raw ahead[M];
#pragma unroll
  for (int m = 0; m < M; ++m)
    if (4 * lane < r.H) ahead[m] = source.load(m, 4 * lane);
#pragma unroll 1
  for (int h = 4 * lane; h < r.H; h += 4 * kWarp) {
    float x[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) source.widen(m, h, ahead[m], x[m]);
#pragma unroll
    for (int m = 0; m < M; ++m)
      if (h + 4 * kWarp < r.H) ahead[m] = source.load(m, h + 4 * kWarp);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float w[4];
      load4(weight + min(n, last) * r.H + h, w);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) totals[m * N + n] += x[m][i] * w[i];
    }
  }
  sum_across_lanes<M * N>(totals);
  constexpr int share = M * N > kWarp ? M * N / kWarp : 1, repeat = M * N > kWarp ? 1 : kWarp / (M * N);
  if (lane % repeat) return;
#pragma unroll
  for (int i = 0; i < share; ++i) {
    const int m = (lane / repeat * share + i) / N, n = (lane / repeat * share + i) % N;
    if (n <= last) logits[m * logits_stride(M, r.E) + first + n] = totals[i];
  }
}

template <int lanes, class Combine>
__device__ __forceinline__ float across(float value, const Combine& combine) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}
template <int lanes>
__device__ __forceinline__ float sum_of(float value) {
  return across<lanes>(value, [](float a, float b) { return a + b; });
}

// The k-th pick of a token: the largest of row, the lowest index on a tie; taken ones are -1. lanes: of the token.
template <int lanes>
__device__ __forceinline__ int next_pick(const float* row, int E, int lane, float* value) {
  float best = -1;
  int best_expert = E;
  for (int e = lane; e < E; e += lanes)
    if (row[e] > best) best = row[e], best_expert = e;
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, best, distance);
    const int other_expert = __shfl_xor_sync(kAllLanes, best_expert, distance);
    if (other > best || (other == best && other_expert < best_expert)) best = other, best_expert = other_expert;
  }
  *value = best;
  return best_expert;
}

// By a warp, for its M tokens: probs = softmax(logits), and their K largest. Overwrites the logits.
// A logit that is not finite makes all of the token's probabilities NaN; its picks stay valid ids.
template <int M>
__device__ __forceinline__ void softmax_top_k(const Router& r, int64_t first_token, float* logits) {
  constexpr int lanes = lanes_per_token(M);
  const int lane = threadIdx.x % lanes, m = threadIdx.x % kWarp / lanes;
  const int64_t t = first_token + m;
  float* row = logits + m * logits_stride(M, r.E);
  float most = -INFINITY, total = 0;
  for (int e = lane; e < r.E; e += lanes) most = fmaxf(most, row[e]);
  most = across<lanes>(most, [](float a, float b) { return fmaxf(a, b); });
  for (int e = lane; e < r.E; e += lanes) {
    const float logit = row[e];
    row[e] = expf(logit - most);
    total += row[e] + 0.f * logit;  // NaN for an infinity, too
  }
  total = sum_of<lanes>(total);
  for (int e = lane; e < r.E; e += lanes) {
    const float probability = row[e] / total;
    if (t < r.T) r.probs[t * r.E + e] = probability;
    row[e] = probability == probability ? probability : 0.f;
  }
  for (int k = 0; k < r.K; ++k) {
    float value;
    const int expert = next_pick<lanes>(row, r.E, lane, &value);
    if (expert % lanes == lane) row[expert] = -1;
    if (lane > 0 || t >= r.T) continue;
    r.topk_weights[t * r.K + k] = value + 0.f * total;
    r.topk_ids[t * r.K + k] = expert;
  }
}

// How the backward is cut: a block has 4 columns a thread, a chunk of an image's tokens (gating: of all tokens), 8 or
// 16 experts. It sums dweight over the chunk for its experts, and makes its share of the tokens' dx, over all experts.
constexpr int kTogether = 8;
constexpr int64_t kWantedBlocks = 6 * 132;  // not asked of the device: the same sums, the same bits, on every one

struct Share {
  int64_t chunk;     // tokens
  unsigned chunks;   // of an image
  int tile, padded;  // tokens whose dlogits lie in shared memory, and the length of a row of them
  int experts;       // of a block
  unsigned expert_blocks;
  Columns cut;
};

inline Share share_of(const GatingSizes& s, int64_t B, int threads) {
  const int64_t L = B > 0 ? s.T / B : 0;
  Share share;
  share.cut = cut_columns(s.H / 4, threads);
  share.experts = s.E <= 8 ? 8 : 16;
  share.expert_blocks = unsigned(ceil_div(s.E, share.experts));
  share.padded = int(share.expert_blocks) * share.experts;
  share.tile = s.E <= 256 ? 32 : kTogether;
  const int64_t blocks = share.cut.blocks * share.expert_blocks * std::max<int64_t>(B, 1);
  const int64_t wanted = std::max<int64_t>(1, kWantedBlocks / blocks);
  share.chunk = std::max<int64_t>(64, ceil_div(ceil_div(L, wanted), kTogether) * kTogether);
  share.chunks = unsigned(ceil_div(L, share.chunk));
  return share;
}

struct RouterGradient {
  int64_t T;
  int H, E, K;
  RouterUpstream upstream;
  const int32_t* topk_ids;
  const float* probs;
  const float* weight;
};

// What d of `router_gradient` begins with.
__device__ __forceinline__ float upstream_of_probs(const RouterUpstream& from, int64_t t, int e) {
  if (from.dprobs.rows) return from.dprobs.rows[t * from.dprobs.stride + e];
  return from.expert_counts ? from.scale * float(from.expert_counts[e]) : 0;
}

// row[e] = dlogits = probs (d - sum(probs d)), d = dprobs + dtopk_weights at the picks, by `lanes` lanes a token; zeros
// for e in [E, padded), and everywhere where the token is not live. All lanes of the warp call it.
template <int lanes>
__device__ __forceinline__ void router_gradient(const RouterGradient& r, int64_t t, bool live, int padded, float* row) {
  const int lane = threadIdx.x % lanes;
  for (int e = lane; e < padded; e += lanes) row[e] = live && e < r.E ? upstream_of_probs(r.upstream, t, e) : 0;
  __syncwarp();
  if (const float* dpicks = r.upstream.dtopk_weights; live && dpicks)
    for (int k = lane; k < r.K; k += lanes) row[r.topk_ids[t * r.K + k]] += dpicks[t * r.K + k];
  __syncwarp();
  float mean = 0;
  if (live)
    for (int e = lane; e < r.E; e += lanes) mean += r.probs[t * r.E + e] * row[e];
  mean = sum_of<lanes>(mean);
  if (live)
    for (int e = lane; e < r.E; e += lanes) row[e] = r.probs[t * r.E + e] * (row[e] - mean);
}

// sums[i] = sum over experts of dlogits[i * stride + e] weight[e, h...], for P tokens and four columns; the dlogits lie
// in shared memory, padded with zeros to a multiple of four.
template <int P>
__device__ __forceinline__ void weigh_experts(const RouterGradient& r, const float* dlogits, int stride, int64_t h,
                                              float (&sums)[P][4]) {
#pragma unroll
  for (int i = 0; i < P; ++i)
#pragma unroll
    for (int c = 0; c < 4; ++c) sums[i][c] = 0;
  for (int e = 0; e < r.E; e += 4) {
    float w[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) load4(r.weight + int64_t(min(e + j, r.E - 1)) * r.H + h, w[j]);
#pragma unroll
    for (int i = 0; i < P; ++i) {
      float d[4];
      load4(dlogits + i * stride + e, d);
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[i][c] += d[j] * w[j][c];
    }
  }
}

// sums[n][c] += dlogits[n] token[c]
template <int N>
__device__ __forceinline__ void add_outer(const float* dlogits, const float (&token)[4], float (&sums)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; n += 4) {
    float d[4];
    load4(dlogits + n, d);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[n + j][c] += d[j] * token[c];
  }
}

// Rows first to first + N of partial dweight sums (E, H).
template <int N>
__device__ __forceinline__ void store_dweight(float* partial, int E, int H, int first, int64_t h,
                                              const float (&sums)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
    if (first + n < E) store4(partial + int64_t(first + n) * H + h, sums[n]);
}

}  // namespace moe::cuda
