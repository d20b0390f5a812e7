#include "selection.h"

#include <algorithm>

#include "device.h"
#include "scratch.h"

namespace moe::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kDigits = kThreads, kPasses = 4;
constexpr int64_t kMostParts = 128, kLeastPart = 4096;  // every block reads the counts of all parts of its column

// Scores as unsigned integers in the same order: -0 equals 0, NaN is above infinity as in torch's sort.
__device__ inline unsigned key_of(float score) {
  if (score != score) return ~0u;
  const unsigned bits = __float_as_uint(score + 0.0f);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ inline float score_of(unsigned key) { return __uint_as_float(key >> 31 ? key & ~(1u << 31) : ~key); }

// Column g N + n: M scores, N apart, cut into parts. State (pass, column) and digits (column, part, digit) are made as
// the digits of the smallest picked score are found, one in every pass, from the top.
struct Columns {
  int64_t M, N, part;
  int parts;
  const float* scores;
  const int32_t* counts;  // null: count
  int64_t count;
  unsigned* bound;   // the digits so far
  int32_t* needed;   // how many are picked of those that have them
  int32_t* digits;   // of this pass, and
  int32_t* earlier;  // of the one before

  __device__ const float* column() const { return scores + blockIdx.x / N * M * N + blockIdx.x % N; }
  __device__ int64_t wanted() const { return min(max(counts ? int64_t(counts[blockIdx.x]) : count, int64_t(0)), M); }
  __device__ int64_t begin() const { return int64_t(blockIdx.y) * part; }
  __device__ int64_t end() const { return min(M, begin() + part); }
};

struct Bound {
  unsigned bound;
  int needed, before;  // picked of those that have the digits so far; how many of these lie in earlier parts
};

// The sum of earlier threads' values, and of all: one barrier, `sums` is free again after the next.
struct Scan {
  int before, all;
  __device__ Scan(int value, int* sums) : before(value), all(0) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int other = __shfl_up_sync(kAllLanes, before, distance);
      if (lane >= distance) before += other;
    }
    if (lane == kWarp - 1) sums[warp] = before;
    __syncthreads();
    before -= value;
    for (int w = 0; w < kWarps; ++w) {
      before += w < warp ? sums[w] : 0;
      all += sums[w];
    }
  }
};

// By all threads: the bound with the digit of `pass`, whose counts are complete. Thread i has the i-th digit from
// above.
__device__ Bound narrowed(const Columns& c, const int32_t* digits, int pass) {
  __shared__ int sums[kWarps];
  __shared__ Bound found;
  const int digit = kDigits - 1 - int(threadIdx.x);
  const int64_t column = blockIdx.x;
  const unsigned bound = c.bound[pass * int64_t(gridDim.x) + column];
  const int needed = c.needed[pass * int64_t(gridDim.x) + column];
  int total = 0, before = 0;
  for (int p = 0; p < c.parts; ++p) {
    const int count = digits[(column * c.parts + p) * kDigits + digit];
    total += count;
    before += p < int(blockIdx.y) ? count : 0;
  }
  if (threadIdx.x == 0) found = {bound, 0, 0};  // where nothing is picked nobody writes
  const int above = Scan(total, sums).before;
  if (above < needed && needed <= above + total)
    found = {bound | unsigned(digit) << (24 - 8 * pass), needed - above, before};
  __syncthreads();
  return found;
}

// Counts the digits of `pass` in a part, of the keys that have all digits of the bound. Block (column, part).
__global__ void __launch_bounds__(kThreads) select_top_count(Columns c, int pass) {
  take_turn();
  __shared__ int hits[kWarps][kDigits];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int d = lane; d < kDigits; d += kWarp) hits[warp][d] = 0;
  Bound now{0, int(c.wanted()), 0};
  if (pass > 0) now = narrowed(c, c.earlier, pass - 1);
  if (blockIdx.y == 0 && threadIdx.x == 0) {
    c.bound[pass * int64_t(gridDim.x) + blockIdx.x] = now.bound;
    c.needed[pass * int64_t(gridDim.x) + blockIdx.x] = now.needed;
  }
  __syncwarp();
  const float* column = c.column();
  for (int64_t first = c.begin(); first < c.end(); first += kThreads) {
    const int64_t m = first + threadIdx.x;
    const unsigned key = m < c.end() ? key_of(column[m * c.N]) : 0;
    const bool live = m < c.end() && (pass == 0 || (key ^ now.bound) >> (32 - 8 * pass) == 0);
    const int digit = live ? int(key >> (24 - 8 * pass) & (kDigits - 1)) : -1;
    const unsigned same = __match_any_sync(kAllLanes, digit);
    if (live && (same & ((1u << lane) - 1u)) == 0) hits[warp][digit] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  int total = 0;
  for (int w = 0; w < kWarps; ++w) total += hits[w][threadIdx.x];
  c.digits[(int64_t(blockIdx.x) * c.parts + blockIdx.y) * kDigits + threadIdx.x] = total;
}

// Marks a part: the keys above the bound, and the first of those that equal it. Block (column, part).
__global__ void __launch_bounds__(kThreads) select_top_mark(Columns c, uint8_t* picks, float* least) {
  take_turn();
  __shared__ int sums[2][kWarps];
  const bool some = c.wanted() > 0;
  const Bound last = narrowed(c, c.earlier, kPasses - 1);
  if (blockIdx.y == 0 && threadIdx.x == 0) least[blockIdx.x] = some ? score_of(last.bound) : INFINITY;
  int ties = last.needed - last.before;
  const float* column = c.column();
  uint8_t* out = picks + (column - c.scores);
  for (int64_t first = c.begin(), half = 0; first < c.end(); first += kThreads, half ^= 1) {
    const int64_t m = first + threadIdx.x;
    const unsigned key = m < c.end() ? key_of(column[m * c.N]) : 0;
    const bool equal = m < c.end() && key == last.bound;
    const Scan equals(equal, sums[half]);
    if (m < c.end()) out[m * c.N] = some && (key > last.bound || (equal && equals.before < ties));
    ties -= equals.all;
  }
}

int64_t part_of(int64_t M) { return std::max(kLeastPart, ceil_div(ceil_div(M, kMostParts), kThreads) * kThreads); }

Columns columns_of(int64_t G, int64_t M, int64_t N, Scratch& scratch) {
  Columns c{};
  c.M = M, c.N = N, c.part = part_of(M), c.parts = int(ceil_div(M, c.part));
  c.bound = scratch.take<unsigned>(kPasses * G * N);
  c.needed = scratch.take<int32_t>(kPasses * G * N);
  c.digits = scratch.take<int32_t>(G * N * c.parts * kDigits);
  c.earlier = scratch.take<int32_t>(G * N * c.parts * kDigits);
  return c;
}

__global__ void __launch_bounds__(kThreads) select_top_none(int64_t columns, float* least) {
  take_turn();
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < columns) least[i] = INFINITY;
}

// By a warp: the place of the largest of keys, the first on a tie.
__device__ inline int best_of(const unsigned* keys, int count) {
  unsigned best = 0;
  int place = count;
  for (int i = threadIdx.x % kWarp; i < count; i += kWarp)
    if (keys[i] > best) best = keys[i], place = i;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const unsigned other = __shfl_xor_sync(kAllLanes, best, distance);
    const int other_place = __shfl_xor_sync(kAllLanes, place, distance);
    if (other > best || (other == best && other_place < place)) best = other, place = other_place;
  }
  return place;
}

// The sum of the two largest of a group's scores.
__device__ inline float worth(const unsigned* keys, int count) {
  unsigned first = 0, second = 0;
  for (int i = 0; i < count; ++i) second = max(second, min(first, keys[i])), first = max(first, keys[i]);
  return count == 1 ? score_of(first) : score_of(first) + score_of(second);
}

struct Experts {
  int64_t T;
  int E, K, groups, taken;
};

// A warp for a token. Keys are above 0, which is what a place has that was taken.
__global__ void __launch_bounds__(kThreads) select_experts_best(Experts s, const float* scores, int32_t* ids) {
  take_turn();
  MOE_DYNAMIC_SHARED(memory);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, size = s.E / s.groups;
  unsigned* keys = reinterpret_cast<unsigned*>(memory) + warp * (s.E + s.groups);
  unsigned* worths = keys + s.E;
  const int64_t t = int64_t(blockIdx.x) * kWarps + warp;
  if (t >= s.T) return;
  for (int e = lane; e < s.E; e += kWarp) keys[e] = key_of(scores[t * s.E + e]);
  __syncwarp();
  if (s.taken < s.groups) {
    for (int g = lane; g < s.groups; g += kWarp) worths[g] = key_of(worth(keys + g * size, size));
    __syncwarp();
    for (int i = 0; i < s.taken; ++i) {
      const int group = best_of(worths, s.groups);
      __syncwarp();
      if (lane == 0) worths[group] = 0;
      __syncwarp();
    }
    for (int e = lane; e < s.E; e += kWarp)
      if (worths[e / size]) keys[e] = key_of(-INFINITY);
    __syncwarp();
  }
  for (int k = 0; k < s.K; ++k) {
    const int expert = best_of(keys, s.E);
    __syncwarp();
    if (lane == 0) keys[expert] = 0, ids[t * s.K + k] = expert;
    __syncwarp();
  }
}

}  // namespace

int64_t select_top_workspace_bytes(int64_t G, int64_t M, int64_t N) {
  Scratch scratch;
  columns_of(G, M, N, scratch);
  return scratch.bytes();
}

void select_top(int64_t G, int64_t M, int64_t N, const float* scores, const int32_t* counts, int64_t count,
                uint8_t* picks, float* least, void* workspace, cudaStream_t stream) {
  Scratch scratch(workspace);
  Columns c = columns_of(G, M, N, scratch);
  c.scores = scores, c.counts = counts, c.count = count;
  if (M == 0)
    return launch(select_top_none, dim3(unsigned(ceil_div(G * N, kThreads))), kThreads, 0, stream, G * N, least);
  const dim3 blocks(unsigned(G * N), unsigned(c.parts));
  for (int pass = 0; pass < kPasses; ++pass) {
    launch(select_top_count, blocks, kThreads, 0, stream, c, pass);
    std::swap(c.digits, c.earlier);
  }
  launch(select_top_mark, blocks, kThreads, 0, stream, c, picks, least);
}

void select_experts(int64_t T, int64_t E, int64_t K, int64_t groups, int64_t groups_taken, const float* scores,
                    int32_t* ids, cudaStream_t stream) {
  const Experts s{T, int(E), int(K), int(groups), int(groups_taken)};
  launch(select_experts_best, dim3(unsigned(ceil_div(T, kWarps))), kThreads, kWarps * (E + groups) * 4, stream, s,
         scores, ids);
}

}  // namespace moe::cuda
