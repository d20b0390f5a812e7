#include <algorithm>

#include "device.h"
#include "selection.h"

namespace moe::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int64_t kMostChunks = 128;  // every block reads the counts of all

// Tokens of a block, whole warps' shares.
int64_t chunk_of(int64_t T) { return kWarps * std::max<int64_t>(4, ceil_div(T, kWarps * kMostChunks)); }

struct Marks {
  int64_t T, R, chunk;
  int E, chunks;
  const float* weights;
  const uint8_t* picks;
  int32_t* counts;  // (chunks, E)

  __device__ int64_t begin() const {
    return min(T, int64_t(blockIdx.x) * chunk + int64_t(threadIdx.x / kWarp) * (chunk / kWarps));
  }
  __device__ int64_t end() const { return min(T, begin() + chunk / kWarps); }
};

// hits[e] = marks of expert e among this warp's tokens. A lane counts its own experts.
__device__ void count_marks(const Marks& s, int* hits) {
  const int64_t end = s.end();
  for (int e = threadIdx.x % kWarp; e < s.E; e += kWarp) {
    int count = 0;
#pragma unroll 4
    for (int64_t t = s.begin(); t < end; ++t) count += s.picks[t * s.E + e] != 0;
    hits[e] = count;
  }
}

__global__ void __launch_bounds__(kThreads) dispatch_mask_count(Marks s) {
  take_turn();
  MOE_DYNAMIC_SHARED(memory);
  int* hits = reinterpret_cast<int*>(memory);  // (kWarps, E)
  count_marks(s, hits + threadIdx.x / kWarp * s.E);
  __syncthreads();
  for (int e = threadIdx.x; e < s.E; e += kThreads) {
    int total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += hits[warp * s.E + e];
    s.counts[int64_t(blockIdx.x) * s.E + e] = total;
  }
}

// By one warp: first[e] = rows of earlier experts, from their numbers; the first block writes them into the plan.
__device__ void first_rows(const Marks& s, const int* total, int* first, const PlanOut& plan) {
  const int lane = threadIdx.x % kWarp;
  int carried = 0;
  for (int base = 0; base < s.E; base += kWarp) {
    const int e = base + lane, count = e < s.E ? total[e] : 0;
    int offset = count;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int other = __shfl_up_sync(kAllLanes, offset, distance);
      if (lane >= distance) offset += other;
    }
    const int begin = carried + offset - count;
    if (e < s.E) first[e] = begin;
    if (e < s.E && blockIdx.x == 0) {
      plan.expert_offsets[e] = int32_t(min(int64_t(begin), s.R));
      plan.expert_counts[e] = int32_t(min(int64_t(begin + count), s.R) - min(int64_t(begin), s.R));
    }
    carried += __shfl_sync(kAllLanes, offset, kWarp - 1);
  }
  if (lane == 0) first[s.E] = carried;
  if (lane > 0 || blockIdx.x > 0) return;
  plan.expert_offsets[s.E] = plan.token_row_offsets[s.T] = int32_t(min(int64_t(carried), s.R));
}

// A row for each mark of this warp's tokens, in order: next[e] is the next one of expert e, and `slot` how many rows
// earlier tokens have.
__device__ void place_marks(const Marks& s, int* next, int slot, const PlanOut& plan) {
  const int lane = threadIdx.x % kWarp;
  const int64_t end = s.end();
  for (int64_t t = s.begin(); t < end; ++t) {
    if (lane == 0) plan.token_row_offsets[t] = slot;
    for (int base = 0; base < s.E; base += kWarp) {
      const int e = base + lane;
      const bool marked = e < s.E && s.picks[t * s.E + e] != 0;
      const int row = marked ? next[e]++ : 0;
      const bool kept = marked && row < s.R;
      const unsigned rows = __ballot_sync(kAllLanes, kept);
      if (kept) {
        plan.row_token[row] = int32_t(t);
        plan.row_pick[row] = int32_t(t * s.E + e);
        plan.row_weight[row] = s.weights[t * s.E + e];
        plan.token_rows[slot + __popc(rows & ((1u << lane) - 1u))] = row;
      }
      slot += __popc(rows);
    }
  }
}

__global__ void __launch_bounds__(kThreads) dispatch_mask_place(Marks s, PlanOut plan) {
  take_turn();
  MOE_DYNAMIC_SHARED(memory);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int* next = reinterpret_cast<int*>(memory);  // (kWarps, E)
  int* total = next + kWarps * s.E;            // (E)
  int* first = total + s.E;                    // (E + 1)
  count_marks(s, next + warp * s.E);
  __syncthreads();
  for (int e = threadIdx.x; e < s.E; e += kThreads) {
    int all = 0, row = 0;
    for (int chunk = 0; chunk < s.chunks; ++chunk) {
      const int count = s.counts[int64_t(chunk) * s.E + e];
      row += chunk < int(blockIdx.x) ? count : 0;
      all += count;
    }
    for (int w = 0; w < kWarps; ++w) {
      const int count = next[w * s.E + e];
      next[w * s.E + e] = row;
      row += count;
    }
    total[e] = all;
  }
  __syncthreads();
  if (warp == 0) first_rows(s, total, first, plan);
  __syncthreads();
  int slot = 0;
  for (int e = lane; e < s.E; e += kWarp) {
    int& row = next[warp * s.E + e];
    row += first[e];
    slot += int(min(int64_t(row), s.R) - min(int64_t(first[e]), s.R));
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) slot += __shfl_xor_sync(kAllLanes, slot, distance);
  place_marks(s, next + warp * s.E, slot, plan);
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t r = first[s.E] + int64_t(blockIdx.x) * kThreads + threadIdx.x; r < s.R; r += step) {
    plan.row_token[r] = 0;
    plan.row_weight[r] = 0;
    plan.row_pick[r] = int32_t(s.T * s.E);
    plan.token_rows[r] = int32_t(r);
  }
}

}  // namespace

int64_t dispatch_mask_workspace_bytes(int64_t T, int64_t E) { return ceil_div(T, chunk_of(T)) * E * 4; }

void dispatch_mask_fwd(int64_t T, int64_t E, int64_t R, const float* weights, const uint8_t* picks, const PlanOut& plan,
                       void* workspace, cudaStream_t stream) {
  const int64_t chunk = chunk_of(T),
                chunks = std::max<int64_t>(1, ceil_div(T, chunk));  // without tokens one, for zeros
  Marks s{T, R, chunk, int(E), int(T > 0 ? chunks : 0), weights, picks, static_cast<int32_t*>(workspace)};
  launch(dispatch_mask_count, dim3(unsigned(s.chunks)), kThreads, kWarps * E * 4, stream, s);
  launch(dispatch_mask_place, dim3(unsigned(chunks)), kThreads, ((kWarps + 2) * E + 1) * 4, stream, s, plan);
}

}  // namespace moe::cuda
