#include "expert_choice.h"

#include <algorithm>

#include "device.h"

namespace moe::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int64_t kKept = 8192;  // keys of a group in shared memory: four blocks on a processor of sm_80, six on sm_90

struct Choice {
  int64_t T, G, C;  // tokens: all, of a group, those that an expert takes of it
  int64_t rows;  // of an expert: its tokens in all groups
  int E;
  const float* affinities;  // (T, E)
  int32_t* row_of;  // (E, T): the row of a token at an expert; ~row where it has none, row being the next one
};

// Affinities as unsigned integers in the same order: -0 equals 0, NaN is above infinity as in torch's sort.
__device__ inline unsigned key_of(float affinity) {
  if (affinity != affinity) return ~0u;
  const unsigned bits = __float_as_uint(affinity + 0.0f);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}

// The keys of an expert in a group: in shared memory, or where its part of row_of will be. Every thread reads only keys
// that it wrote itself, of tokens threadIdx.x, threadIdx.x + blockDim.x, ...: they need no barrier.
struct Keys {
  int64_t count;
  unsigned* data;

  __device__ Keys(const Choice& c, int64_t first_token, int e, void* shared) : count(c.G) {
    data = static_cast<unsigned*>(c.G <= kKept ? shared : c.row_of + e * c.T + first_token);
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x)
      data[i] = key_of(c.affinities[(first_token + i) * c.E + e]);
  }
};

// How many keys are at least `least`, known to every thread. One barrier: the next call needs other `counts`.
__device__ int64_t count_from(const Keys& keys, unsigned least, int* counts) {
  int count = 0;
  for (int64_t first = 0; first < keys.count; first += blockDim.x) {
    const int64_t i = first + threadIdx.x;
    count += __popc(__ballot_sync(kAllLanes, i < keys.count && keys.data[i] >= least));
  }
  if (threadIdx.x % kWarp == 0) counts[threadIdx.x / kWarp] = count;
  __syncthreads();
  int64_t total = 0;
  for (int warp = 0; warp < int(blockDim.x) / kWarp; ++warp) total += counts[warp];
  return total;
}

// Taken are the keys above `bound`, and the first `ties` of those that equal it.
struct Limit {
  unsigned bound;
  int64_t ties;
};

// The C-th largest key is the largest bound that C keys reach. Where exactly C reach a bound, its lower bits do not
// matter: after 10 to 18 of the 32 bits on average, for softmax outputs in groups of 16 to 8192. The keys above the
// result are those that reached the last bound refused.
__device__ Limit limit_of(const Keys& keys, int64_t C, int (&counts)[2][kWarps]) {
  Limit limit{0, C};
  for (int bit = 31; bit >= 0; --bit) {
    const unsigned raised = limit.bound | 1u << bit;
    const int64_t reached = count_from(keys, raised, counts[bit % 2]);
    if (reached == C) return {raised - 1, 0};
    if (reached > C)
      limit.bound = raised;
    else
      limit.ties = C - reached;
  }
  return limit;
}

// Of up to kThreads tokens in order: how many keys before this thread's, and how many in all, are above the bound and
// equal it. Calls take the halves of `counts` in turn, as those of count_from.
struct Places {
  int above, equal, all_above, all_equal;
  __device__ Places(bool is_above, bool is_equal, int* counts) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const unsigned earlier = (1u << lane) - 1u;
    const unsigned aboves = __ballot_sync(kAllLanes, is_above), equals = __ballot_sync(kAllLanes, is_equal);
    if (lane == 0) counts[warp] = __popc(aboves) | __popc(equals) << 16;  // both at most kThreads in all
    __syncthreads();
    int before = 0, all = 0;
    for (int other = 0; other < int(blockDim.x) / kWarp; ++other) {
      before += other < warp ? counts[other] : 0;
      all += counts[other];
    }
    above = (before & 0xFFFF) + __popc(aboves & earlier), equal = (before >> 16) + __popc(equals & earlier);
    all_above = all & 0xFFFF, all_equal = all >> 16;
  }
};

// A block per group and expert, experts next to each other: they read the same lines of the affinities.
__global__ void __launch_bounds__(kThreads) choice_fwd_select(Choice c, PlanOut plan) {
  take_turn();
  MOE_DYNAMIC_SHARED(memory);
  __shared__ int counts[2][kWarps], places[2][kWarps];
  const int e = blockIdx.x % c.E;
  const int64_t group = blockIdx.x / c.E, first_token = group * c.G;
  const Keys keys(c, first_token, e, memory);
  Limit limit = limit_of(keys, c.C, counts);
  int64_t first_row = e * c.rows + group * c.C;
  for (int64_t first = 0, half = 0; first < c.G; first += blockDim.x, half ^= 1) {
    const int64_t i = first + threadIdx.x, token = first_token + i;
    const unsigned key = i < c.G ? keys.data[i] : 0;
    const bool above = i < c.G && key > limit.bound, equal = i < c.G && key == limit.bound;
    const Places at(above, equal, places[half]);
    const int64_t row = first_row + at.above + min(int64_t(at.equal), limit.ties);
    const bool taken = above || (equal && at.equal < limit.ties);
    if (i < c.G) c.row_of[e * c.T + token] = int32_t(taken ? row : ~row);
    if (taken) {
      plan.row_token[row] = int32_t(token);
      plan.row_pick[row] = int32_t(token * c.E + e);
      plan.row_weight[row] = c.affinities[token * c.E + e];
    }
    const int64_t ties = min(int64_t(at.all_equal), limit.ties);
    first_row += at.all_above + ties, limit.ties -= ties;
  }
}

// A thread per token. The entries before its own are the rows of earlier tokens, at every expert as many as lie before
// the token's row there, or before the next one where it has none: no scan over tokens. Its rows ascend as experts do.
__global__ void __launch_bounds__(kThreads) choice_fwd_tokens(Choice c, PlanOut plan) {
  take_turn();
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < c.E) plan.expert_counts[i] = int32_t(c.rows);
  if (i <= c.E) plan.expert_offsets[i] = int32_t(i * c.rows);
  if (i == c.T) plan.token_row_offsets[i] = int32_t(c.E * c.rows);
  if (i >= c.T) return;
  int64_t entry = 0;
#pragma unroll 8
  for (int e = 0; e < c.E; ++e) {
    const int32_t row = c.row_of[e * c.T + i];
    entry += (row < 0 ? ~row : row) - e * c.rows;
  }
  plan.token_row_offsets[i] = int32_t(entry);
#pragma unroll 8
  for (int e = 0; e < c.E; ++e) {
    const int32_t row = c.row_of[e * c.T + i];
    if (row >= 0) plan.token_rows[entry++] = row;
  }
}

}  // namespace

int64_t dispatch_expert_choice_workspace_bytes(int64_t T, int64_t E) { return T * E * 4; }

void dispatch_expert_choice_fwd(int64_t T, int64_t E, int64_t capacity, int64_t tokens_per_group,
                                const float* affinities, const PlanOut& plan, void* workspace, cudaStream_t stream) {
  const int64_t G = tokens_per_group, groups = T / G;
  const Choice choice{T, G, capacity, groups * capacity, int(E), affinities, static_cast<int32_t*>(workspace)};
  const int threads = int(std::min<int64_t>(ceil_div(G, kWarp), kWarps)) * kWarp;
  launch(choice_fwd_select, dim3(unsigned(groups * E)), threads, G <= kKept ? G * 4 : 0, stream, choice, plan);
  launch(choice_fwd_tokens, dim3(unsigned(ceil_div(std::max(T, E) + 1, kThreads))), kThreads, 0, stream, choice, plan);
}

}  // namespace moe::cuda
