// LayerNorm and modulation around gating. Blocks stay inside one image, so that sums over an image need no atomics.
#include <algorithm>

#include "columns.h"
#include "gating.h"
#include "gating_warp.h"
#include "scratch.h"
#include "sums.h"

namespace moe::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp, kTokens = 4;  // of a block, of a warp

template <class X>
struct Modulated {
  const X* x;
  AnyFloats shift, scale;
  float eps;
  unsigned tokens_per_image;

  __device__ __forceinline__ int64_t image_of(int64_t t) const { return unsigned(t) / tokens_per_image; }
};

// The source of router_logits that makes the tokens, and keeps them. moments: see gating.h.
template <class X, class S>
struct ModulatedRows {
  using Raw = Four<X>;
  const Modulated<X>& in;
  S* tokens;
  int H;
  int64_t at[kTokens];
  float mean[kTokens], reciprocal[kTokens];

  __device__ __forceinline__ ModulatedRows(const Modulated<X>& modulated, S* into, int64_t first_token, const Router& r)
      : in(modulated), tokens(into), H(r.H) {
#pragma unroll
    for (int m = 0; m < kTokens; ++m) at[m] = min(first_token + m, r.T - 1), mean[m] = 0, reciprocal[m] = 0;
  }

  __device__ __forceinline__ void find_moments() {
    const int lane = threadIdx.x % kWarp;
#pragma unroll 2
    for (int h = 4 * lane; h < H; h += 4 * kWarp) add(h, mean, [](float x, int) { return x; });
#pragma unroll
    for (int m = 0; m < kTokens; ++m) mean[m] = warp_sum(mean[m]) / float(H);
#pragma unroll 2
    for (int h = 4 * lane; h < H; h += 4 * kWarp)
      add(h, reciprocal, [&](float x, int m) { return (x - mean[m]) * (x - mean[m]); });
#pragma unroll
    for (int m = 0; m < kTokens; ++m) reciprocal[m] = 1.f / sqrtf(warp_sum(reciprocal[m]) / float(H) + in.eps);
  }

  template <class Summand>
  __device__ __forceinline__ void add(int h, float (&totals)[kTokens], const Summand& summand) const {
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      float x[4];
      load4(in.x + at[m] * H + h, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) totals[m] += summand(x[i], m);
    }
  }

  __device__ __forceinline__ Raw load(int m, int h) const {
    return *reinterpret_cast<const Raw*>(in.x + at[m] * H + h);
  }
  __device__ __forceinline__ void widen(int m, int h, const Raw& raw, float (&values)[4]) const {
    float shift[4], scale[4];
    in.shift.load(in.image_of(at[m]) * H + h, shift);
    in.scale.load(in.image_of(at[m]) * H + h, scale);
    Four<S> token;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      token.at[i] = narrow<S>((wide(raw.at[i]) - mean[m]) * reciprocal[m] * (1.f + scale[i]) + shift[i]);
      values[i] = wide(token.at[i]);
    }
    *reinterpret_cast<Four<S>*>(tokens + at[m] * H + h) = token;
  }
};

// tokens = LayerNorm(x) (1 + scale_b) + shift_b, then gating; a warp has kTokens tokens. x comes from memory once, then
// from L1; the tokens, for the second 8 experts on, are read by the lanes that wrote them.
template <class X, class S>
__global__ void __launch_bounds__(kThreads, 3)
    adaln_fwd_gating(Router r, Modulated<X> modulated, S* tokens, float* moments) {
  take_turn();
  MOE_DYNAMIC_SHARED(memory);
  constexpr int N = 8;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first_token = (int64_t(blockIdx.x) * kWarps + warp) * kTokens;
  if (first_token >= r.T) return;
  float* logits = reinterpret_cast<float*>(memory) + warp * kTokens * logits_stride(kTokens, r.E);
  ModulatedRows<X, S> source(modulated, tokens, first_token, r);
  source.find_moments();
#pragma unroll
  for (int m = 0; m < kTokens; ++m)
    if (lane == m && first_token + m < r.T) {
      moments[first_token + m] = source.mean[m];
      moments[r.T + first_token + m] = source.reciprocal[m];
    }
  router_logits<kTokens, N>(r, 0, source, logits);
  const TokenRows<S, kTokens> made(tokens, first_token, r);
  for (int first = N; first < r.E; first += N) router_logits<kTokens, N>(r, first, made, logits);
  __syncwarp();
  softmax_top_k<kTokens>(r, first_token, logits);
}

// What the two kernels of the backward share.
template <class X, class S>
struct Backward {
  RouterGradient r;
  Modulated<X> in;
  const S* dtokens;      // null: none
  const float* moments;  // (2, T)
  float* dlogits;        // (T, E)
  float* sums;           // (2, T)
};

// dlogits, and sums (2, T) over a token's features of dnormal and of dnormal normal, which LayerNorm's gradient needs;
// dnormal = (dtokens + dlogits weight) (1 + scale_b). A warp has kTokens tokens.
template <class X, class S>
__global__ void __launch_bounds__(kThreads, 5) adaln_bwd_sums(Backward<X, S> b, int padded) {
  take_turn();
  MOE_DYNAMIC_SHARED(memory);
  constexpr int lanes = kWarp / kTokens;
  const RouterGradient& r = b.r;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first_token = (int64_t(blockIdx.x) * kWarps + warp) * kTokens;
  if (first_token >= r.T) return;
  float* dlogits = reinterpret_cast<float*>(memory) + warp * kTokens * padded;
  const int64_t mine = first_token + lane / lanes;
  float* row = dlogits + lane / lanes * padded;
  router_gradient<lanes>(r, mine, mine < r.T, padded, row);
  if (mine < r.T)
    for (int e = lane % lanes; e < r.E; e += lanes) b.dlogits[mine * r.E + e] = row[e];
  __syncwarp();
  float sums[2 * kTokens] = {};
#pragma unroll 1
  for (int h = 4 * lane; h < r.H; h += 4 * kWarp) {
    float gradients[kTokens][4];
    weigh_experts(r, dlogits, padded, h, gradients);
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      const int64_t t = min(first_token + m, r.T - 1);
      float x[4], scale[4], upstream[4] = {};
      load4(b.in.x + t * r.H + h, x);
      b.in.scale.load(b.in.image_of(t) * r.H + h, scale);
      if (b.dtokens) load4(b.dtokens + t * r.H + h, upstream);
      const float mean = b.moments[t], reciprocal = b.moments[r.T + t];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float dnormal = (gradients[m][i] + upstream[i]) * (1.f + scale[i]);
        sums[m] += dnormal;
        sums[kTokens + m] += dnormal * ((x[i] - mean) * reciprocal);
      }
    }
  }
  sum_across_lanes<2 * kTokens>(sums);  // sum i is now with lane 4 i
  const int i = lane / (kWarp / (2 * kTokens)), m = i % kTokens;
  if (lane % (kWarp / (2 * kTokens)) == 0 && first_token + m < r.T)
    b.sums[i / kTokens * r.T + first_token + m] = sums[0];
}

struct Outputs {
  float* dmodulation;  // (2, chunks x expert blocks, B, H): parts of dshift and of dscale
  float* dweight;      // (B x chunks, E, H): parts
};

// Of a tile's tokens in shared memory: dlogits (tile, padded), and the four numbers of each token.
struct Tile {
  float* dlogits;
  float *mean, *reciprocal, *plain, *along;

  __device__ Tile(char* memory, const Share& share) : dlogits(reinterpret_cast<float*>(memory)) {
    mean = dlogits + share.tile * share.padded;
    reciprocal = mean + share.tile, plain = reciprocal + share.tile, along = plain + share.tile;
  }
  template <class X, class S>
  __device__ void fill(const Backward<X, S>& b, const Share& share, int64_t begin, int count) const {
    const int64_t T = b.r.T;
    for (int i = threadIdx.x; i < share.tile * share.padded; i += blockDim.x) {
      const int slot = i / share.padded, e = i % share.padded;
      dlogits[i] = slot < count && e < b.r.E ? b.dlogits[(begin + slot) * b.r.E + e] : 0;
    }
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      mean[i] = b.moments[begin + i], reciprocal[i] = b.moments[T + begin + i];
      plain[i] = b.sums[begin + i] / float(b.r.H), along[i] = b.sums[T + begin + i] / float(b.r.H);
    }
  }
};

// A thread's four columns of an image.
struct Column {
  float factor[4], shift[4], dshift[4] = {}, dscale[4] = {};

  template <class X>
  __device__ __forceinline__ void load(const Modulated<X>& in, int64_t at) {
    in.scale.load(at, factor);
    in.shift.load(at, shift);
    for (float& value : factor) value += 1.f;
  }
};

// dx of kTogether tokens from `first` of the tile on, and what they add to dshift and dscale.
template <class X, class S>
__device__ __forceinline__ void normal_gradient(const Backward<X, S>& b, const Share& share, const Tile& tile,
                                                int64_t begin, int first, int count, int64_t h, Column& column, X* dx) {
  float gradients[kTogether][4];
  weigh_experts(b.r, tile.dlogits + first * share.padded, share.padded, h, gradients);
#pragma unroll
  for (int j = 0; j < kTogether; ++j) {
    const int i = first + j;
    if (i >= count) break;
    const int64_t at = (begin + i) * b.r.H + h;
    float x[4], upstream[4] = {}, out[4];
    load4(b.in.x + at, x);
    if (b.dtokens) load4(b.dtokens + at, upstream);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float gradient = gradients[j][c] + upstream[c], normal = (x[c] - tile.mean[i]) * tile.reciprocal[i];
      column.dshift[c] += gradient;
      column.dscale[c] += gradient * normal;
      out[c] = tile.reciprocal[i] * (gradient * column.factor[c] - tile.plain[i] - normal * tile.along[i]);
    }
    store4(dx + at, out);
  }
}

// dx, and over each chunk of an image's tokens, in order, the sums that are dshift, dscale and dweight; the blocks of
// the other experts take their share of the chunk's dx. Grid: (images x chunks, columns, experts).
template <class X, class S, int N>
__global__ void __launch_bounds__(kThreads)
    adaln_bwd_gating(Backward<X, S> b, Share share, Outputs out, X* __restrict__ dx) {
  take_turn();
  MOE_DYNAMIC_SHARED(memory);
  const Tile tile(memory, share);
  const RouterGradient& r = b.r;
  const int64_t h = 4 * (int64_t(blockIdx.y) * blockDim.x + threadIdx.x);
  const unsigned image = blockIdx.x / share.chunks, part = blockIdx.x % share.chunks;
  const int64_t image_begin = int64_t(image) * b.in.tokens_per_image, chunk_begin = image_begin + part * share.chunk;
  const int64_t chunk_end = min(chunk_begin + share.chunk, image_begin + b.in.tokens_per_image);
  const int first_expert = blockIdx.z * N;
  Column column;
  if (h < r.H) column.load(b.in, int64_t(image) * r.H + h);
  float dweight[N][4] = {};
  for (int64_t begin = chunk_begin; begin < chunk_end; begin += share.tile) {
    const int count = int(min(int64_t(share.tile), chunk_end - begin));
    __syncthreads();
    tile.fill(b, share, begin, count);
    __syncthreads();
    if (h >= r.H) continue;
#pragma unroll 2
    for (int i = 0; i < count; ++i) {
      float token[4];
      load4(b.in.x + (begin + i) * r.H + h, token);
#pragma unroll
      for (int c = 0; c < 4; ++c)
        token[c] = wide(narrow<S>((token[c] - tile.mean[i]) * tile.reciprocal[i] * column.factor[c] + column.shift[c]));
      add_outer(tile.dlogits + i * share.padded + first_expert, token, dweight);
    }
    for (int i = 0; i < count; i += kTogether)
      if (unsigned(begin - chunk_begin + i) / kTogether % gridDim.z == blockIdx.z)
        normal_gradient(b, share, tile, begin, i, count, h, column, dx);
  }
  if (h >= r.H) return;
  store_dweight(out.dweight + int64_t(blockIdx.x) * r.E * r.H, r.E, r.H, first_expert, h, dweight);
  const int64_t images = gridDim.x / share.chunks, parts = int64_t(share.chunks) * gridDim.z;
  const int64_t at = ((int64_t(part) * gridDim.z + blockIdx.z) * images + image) * r.H + h;
  store4(out.dmodulation + at, column.dshift);
  store4(out.dmodulation + parts * images * r.H + at, column.dscale);
}

template <class X>
Modulated<X> typed(const GatingSizes& s, const Modulation& m) {
  const unsigned tokens_per_image = m.B > 0 ? std::max(unsigned(s.T / m.B), 1u) : 1;
  return {static_cast<const X*>(m.x), {m.shift, m.shift_dtype}, {m.scale, m.scale_dtype}, m.eps, tokens_per_image};
}

struct Pieces {
  float *dlogits, *sums, *dmodulation, *dweight;
  int64_t bytes;

  Pieces(const GatingSizes& s, int64_t B, const Share& share, void* workspace) {
    Scratch scratch(workspace);
    const int64_t parts = int64_t(share.chunks) * share.expert_blocks;
    dlogits = scratch.take<float>(s.T * s.E), sums = scratch.take<float>(2 * s.T);
    dmodulation = scratch.take<float>(2 * parts * B * s.H), dweight = scratch.take<float>(B * share.chunks * s.E * s.H);
    bytes = scratch.bytes();
  }
};

dim3 blocks_for(int64_t T) { return dim3(unsigned(ceil_div(T, kWarps * kTokens))); }

}  // namespace

void modulated_gating_fwd(const GatingSizes& s, const Modulation& m, const float* weight, void* tokens, float* probs,
                          float* topk_weights, int32_t* topk_ids, float* moments, cudaStream_t stream) {
  const Router r{s.T, int(s.H), int(s.E), int(s.K), weight, probs, topk_weights, topk_ids};
  const size_t shared = size_t(kWarps) * kTokens * logits_stride(kTokens, r.E) * sizeof(float);
  with_dtype(m.x_dtype, [&](auto outer) {
    with_dtype(s.dtype, [&](auto element) {
      using X = decltype(outer);
      using S = decltype(element);
      launch(adaln_fwd_gating<X, S>, blocks_for(s.T), kThreads, shared, stream, r, typed<X>(s, m),
             static_cast<S*>(tokens), moments);
    });
  });
}

int64_t modulated_gating_bwd_workspace_bytes(const GatingSizes& s, const Modulation& m) {
  return Pieces(s, m.B, share_of(s, m.B, kThreads), nullptr).bytes;
}

void modulated_gating_bwd(const GatingSizes& s, const Modulation& m, const void* dtokens, const float* dtopk_weights,
                          const DProbs& dprobs, const float* weight, const int32_t* topk_ids, const float* probs,
                          const float* moments, void* dx, void* dshift, void* dscale, float* dweight, void* workspace,
                          cudaStream_t stream) {
  const Share share = share_of(s, m.B, kThreads);
  const Pieces pieces(s, m.B, share, workspace);
  const RouterGradient r{s.T, int(s.H), int(s.E), int(s.K), {dtopk_weights, dprobs}, topk_ids, probs, weight};
  const int row = int(ceil_div(s.E, 4)) * 4;  // of dlogits in shared memory
  const dim3 blocks(unsigned(m.B * share.chunks), share.cut.blocks, share.expert_blocks);
  const size_t shared = size_t(share.tile) * (share.padded + 4) * sizeof(float);
  with_dtype(m.x_dtype, [&](auto outer) {
    with_dtype(s.dtype, [&](auto element) {
      using X = decltype(outer);
      using S = decltype(element);
      const Backward<X, S> b{r, typed<X>(s, m), static_cast<const S*>(dtokens), moments, pieces.dlogits, pieces.sums};
      launch(adaln_bwd_sums<X, S>, blocks_for(s.T), kThreads, size_t(kWarps) * kTokens * row * sizeof(float), stream, b,
             row);
      const auto kernel = share.experts == 8 ? adaln_bwd_gating<X, S, 8> : adaln_bwd_gating<X, S, 16>;
      launch(kernel, blocks, share.cut.threads, shared, stream, b, share, Outputs{pieces.dmodulation, pieces.dweight},
             static_cast<X*>(dx));
    });
  });
  const int64_t parts = int64_t(share.chunks) * share.expert_blocks, n = m.B * s.H;
  const SumJob jobs[] = {{pieces.dmodulation, parts, n, dshift, m.shift_dtype},
                         {pieces.dmodulation + parts * n, parts, n, dscale, m.scale_dtype},
                         {pieces.dweight, m.B * share.chunks, s.E * s.H, dweight, Dtype::kFloat32}};
  ordered_sums(jobs, 3, stream);
}

}  // namespace moe::cuda
