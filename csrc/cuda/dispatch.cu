#include "dispatch.h"

#include <algorithm>

#include "device.h"

namespace moe::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int64_t kMostChunks = 128;  // every block reads the counts of all

// The picks of a block, and of a warp in it: consecutive ones, whole warps' worth.
struct Chunks {
  int64_t size;
  int count;
};

Chunks chunks_of(int64_t R) {
  const int64_t size = kThreads * (R > 0 ? ceil_div(R, kThreads * kMostChunks) : 1);
  return {size, int(ceil_div(R, size))};
}

// Threads that share the sums over chunks of one expert.
__host__ __device__ constexpr int helpers_of(int E) { return E < kThreads ? kThreads / E : 1; }

struct Picks {
  int64_t R, chunk;
  int K, E, chunks;
  const int32_t* topk_ids;
  const float* topk_weights;
};

// Nobody can raise here: ids outside [0, E) are clamped, so that every row is written.
__device__ inline int expert_of(const Picks& picks, int64_t pick) {
  return min(max(picks.topk_ids[pick], 0), picks.E - 1);
}

// Of 32 picks: which lanes have this lane's expert. Lanes without a pick (-1) only find each other.
struct SameExpertLanes {
  unsigned lanes;
  __device__ explicit SameExpertLanes(int expert) : lanes(__match_any_sync(kAllLanes, expert)) {}
  __device__ int before(int lane) const { return __popc(lanes & ((1u << lane) - 1u)); }
  __device__ int count() const { return __popc(lanes); }
};

// hits[e] = picks of expert e among those of this warp.
__device__ void count_picks(const Picks& picks, int64_t begin, int64_t end, int* hits) {
  const int lane = threadIdx.x % kWarp;
  for (int e = lane; e < picks.E; e += kWarp) hits[e] = 0;
  __syncwarp();
  for (int64_t first = begin; first < end; first += kWarp) {
    const int expert = first + lane < end ? expert_of(picks, first + lane) : -1;
    const SameExpertLanes same(expert);
    if (expert >= 0 && same.before(lane) == 0) hits[expert] += same.count();
    __syncwarp();
  }
}

struct Range {
  int64_t begin, end;
};
__device__ inline Range picks_of_warp(const Picks& picks) {
  const int64_t share = picks.chunk / kWarps;
  const int64_t begin = int64_t(blockIdx.x) * picks.chunk + int(threadIdx.x) / kWarp * share;
  return {min(begin, picks.R), min(begin + share, picks.R)};
}

// counts[block, e] = picks of expert e among those of the block.
__global__ void __launch_bounds__(kThreads) dispatch_fwd_count(Picks picks, int32_t* counts) {
  take_turn();
  MOE_DYNAMIC_SHARED(memory);
  int* hits = reinterpret_cast<int*>(memory);  // (kWarps, E)
  const Range mine = picks_of_warp(picks);
  count_picks(picks, mine.begin, mine.end, hits + int(threadIdx.x) / kWarp * picks.E);
  __syncthreads();
  for (int e = threadIdx.x; e < picks.E; e += kThreads) {
    int total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += hits[warp * picks.E + e];
    counts[int64_t(blockIdx.x) * picks.E + e] = total;
  }
}

// total[e], before[e] = picks of expert e in all blocks, and in those before this one.
__device__ void sum_counts(const Picks& picks, const int32_t* counts, int* total, int* before) {
  const int E = picks.E, helpers = helpers_of(E);
  for (int i = threadIdx.x; i < helpers * E; i += kThreads) {
    int all = 0, some = 0;
#pragma unroll 4
    for (int chunk = i / E; chunk < picks.chunks; chunk += helpers) {
      const int count = counts[int64_t(chunk) * E + i % E];
      all += count;
      some += chunk < int(blockIdx.x) ? count : 0;
    }
    total[i] = all, before[i] = some;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += kThreads)
    for (int helper = 1; helper < helpers; ++helper)
      total[e] += total[helper * E + e], before[e] += before[helper * E + e];
  __syncthreads();
}

// By one warp: before[e] += first row of expert e; the first block also writes counts and offsets of the plan.
__device__ void add_offsets(const Picks& picks, const int* total, int* before, const PlanOut& plan) {
  const int lane = threadIdx.x % kWarp, share = (picks.E + kWarp - 1) / kWarp;
  const int begin = min(lane * share, picks.E), end = min(begin + share, picks.E);
  int mine = 0;
  for (int e = begin; e < end; ++e) mine += total[e];
  int offset = mine;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, offset, distance);
    if (lane >= distance) offset += other;
  }
  offset -= mine;
  for (int e = begin; e < end; ++e) {
    before[e] += offset;
    if (blockIdx.x == 0) plan.expert_counts[e] = total[e], plan.expert_offsets[e] = offset;
    offset += total[e];
  }
  if (blockIdx.x == 0 && lane == 0) plan.expert_offsets[picks.E] = int32_t(picks.R);
}

// A token's rows ascend as its experts do, and as its picks do where experts are equal.
__device__ void place_pick(const Picks& picks, const PlanOut& plan, unsigned pick, int expert, int row) {
  const unsigned K = picks.K, token = pick / K, k = pick % K;
  plan.row_token[row] = int32_t(token);
  plan.row_weight[row] = picks.topk_weights[pick];
  plan.row_pick[row] = int32_t(pick);
  int slot = 0;
  for (unsigned other_k = 0; other_k < K; ++other_k) {
    const int other = expert_of(picks, int64_t(token) * K + other_k);
    slot += other < expert || (other == expert && other_k < k);
  }
  plan.token_rows[int64_t(token) * K + slot] = row;
  if (k == 0) plan.token_row_offsets[token] = int32_t(pick);
}

// row of a pick = first row of its expert + that expert's picks in earlier blocks, in earlier warps, in this warp.
__global__ void __launch_bounds__(kThreads) dispatch_fwd_place(Picks picks, const int32_t* counts, PlanOut plan) {
  take_turn();
  MOE_DYNAMIC_SHARED(memory);
  const int E = picks.E, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int* next = reinterpret_cast<int*>(memory);  // (kWarps, E): counts, then the next row of each expert
  int* total = next + kWarps * E;
  int* before = total + helpers_of(E) * E;
  const Range mine = picks_of_warp(picks);
  count_picks(picks, mine.begin, mine.end, next + warp * E);
  sum_counts(picks, counts, total, before);
  if (warp == 0) add_offsets(picks, total, before, plan);
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += kThreads)
    for (int w = 0, row = before[e]; w < kWarps; ++w) {
      const int count = next[w * E + e];
      next[w * E + e] = row;
      row += count;
    }
  __syncthreads();
  for (int64_t first = mine.begin; first < mine.end; first += kWarp) {
    const bool live = first + lane < mine.end;
    const int expert = live ? expert_of(picks, first + lane) : -1;
    const SameExpertLanes same(expert);
    const int rank = same.before(lane), row = live ? next[warp * E + expert] + rank : 0;
    __syncwarp();
    if (live && rank == 0) next[warp * E + expert] += same.count();
    __syncwarp();
    if (live) place_pick(picks, plan, unsigned(first + lane), expert, row);
  }
  if (blockIdx.x > 0 || threadIdx.x > 0) return;
  plan.token_row_offsets[unsigned(picks.R) / unsigned(picks.K)] = int32_t(picks.R);
}

// A plan without rows.
__global__ void __launch_bounds__(kThreads) dispatch_fwd_empty(int64_t T, int64_t E, PlanOut plan) {
  take_turn();
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < E) plan.expert_counts[i] = 0;
  if (i <= E) plan.expert_offsets[i] = 0;
  if (i <= T) plan.token_row_offsets[i] = 0;
}

__global__ void __launch_bounds__(kThreads) dispatch_bwd_zeros(int64_t count, float* out) {
  take_turn();
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) out[i] = 0;
}

__global__ void __launch_bounds__(kThreads)
    dispatch_bwd_scatter(int64_t R, const float* drow_weight, const int32_t* row_pick, float* out) {
  take_turn();
  const int64_t r = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (r < R) out[row_pick[r]] = drow_weight[r];
}

dim3 blocks_for(int64_t count) { return dim3(unsigned(ceil_div(count, kThreads))); }

}  // namespace

int64_t dispatch_workspace_bytes(int64_t T, int64_t K, int64_t E) { return chunks_of(T * K).count * E * 4; }

void dispatch_fwd(int64_t T, int64_t K, int64_t E, const int32_t* topk_ids, const float* topk_weights,
                  const PlanOut& plan, void* workspace, cudaStream_t stream) {
  const int64_t R = T * K;
  if (R == 0) return launch(dispatch_fwd_empty, blocks_for(std::max(T, E) + 1), kThreads, 0, stream, T, E, plan);
  const Chunks chunks = chunks_of(R);
  const Picks picks{R, chunks.size, int(K), int(E), chunks.count, topk_ids, topk_weights};
  int32_t* counts = static_cast<int32_t*>(workspace);
  const dim3 blocks(unsigned(chunks.count));
  launch(dispatch_fwd_count, blocks, kThreads, kWarps * E * 4, stream, picks, counts);
  launch(dispatch_fwd_place, blocks, kThreads, (kWarps + 2 * helpers_of(int(E))) * E * 4, stream, picks, counts, plan);
}

void dispatch_bwd(int64_t R, int64_t count, const float* drow_weight, const int32_t* row_pick, float* out,
                  cudaStream_t stream) {
  if (R != count) launch(dispatch_bwd_zeros, blocks_for(count), kThreads, 0, stream, count, out);
  launch(dispatch_bwd_scatter, blocks_for(R), kThreads, 0, stream, R, drow_weight, row_pick, out);
}

}  // namespace moe::cuda
