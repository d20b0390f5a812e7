#include "gating.h"

#include <algorithm>

#include "columns.h"
#include "gating_warp.h"
#include "sums.h"

namespace moe::cuda {
namespace {

constexpr int kFwdWarps = 4, kFwdThreads = kFwdWarps * kWarp;

// A warp has M tokens at once, and goes through the experts N at a time: x comes from memory once, then from L1.
template <class S, int M, int N>
__global__ void __launch_bounds__(kFwdThreads, M == 8 ? 3 : 4) gating_fwd_tokens(Router r, const S* x) {
  take_turn();
  MOE_DYNAMIC_SHARED(memory);
  const int warp = threadIdx.x / kWarp;
  const int64_t first_token = (int64_t(blockIdx.x) * kFwdWarps + warp) * M;
  if (first_token >= r.T) return;
  const TokenRows<S, M> tokens(x, first_token, r);
  float* logits = reinterpret_cast<float*>(memory) + warp * M * logits_stride(M, r.E);
  for (int first = 0; first < r.E; first += N) router_logits<M, N>(r, first, tokens, logits);
  __syncwarp();
  softmax_top_k<M>(r, first_token, logits);
}

template <class S, int M, int N>
void launch_gating_fwd(const Router& r, const S* x, cudaStream_t stream) {
  const size_t shared = size_t(kFwdWarps) * M * logits_stride(M, r.E) * sizeof(float);
  launch(gating_fwd_tokens<S, M, N>, dim3(unsigned(ceil_div(r.T, kFwdWarps * M))), kFwdThreads, shared, stream, r, x);
}

// More tokens a warp use each weight more often, fewer make more warps.
template <class S>
void choose_gating_fwd(const Router& r, const S* x, cudaStream_t stream) {
  if (r.T < 2048 || r.E > 1024) return launch_gating_fwd<S, 1, 8>(r, x, stream);
  if (r.T < 16384 || r.E > 512) return launch_gating_fwd<S, 4, 8>(r, x, stream);
  launch_gating_fwd<S, 8, 8>(r, x, stream);
}

template <class W>
__global__ void __launch_bounds__(kFwdThreads) gating_fwd_widen(int64_t n, const W* weight, float* out) {
  take_turn();
  const int64_t i = int64_t(blockIdx.x) * kFwdThreads + threadIdx.x;
  if (i < n) out[i] = wide(weight[i]);
}

constexpr int kBwdThreads = 128;

// dlogits (tile, padded) of tokens begin to end, by the whole block.
__device__ void tile_gradient(const RouterGradient& r, const Share& share, int64_t begin, int64_t end, float* dlogits) {
  constexpr int lanes = 8;
  const int groups = blockDim.x / lanes;
  for (int first = 0; first < share.tile; first += groups) {
    const int slot = first + int(threadIdx.x) / lanes;
    const bool live = begin + slot < end;
    // Slots past the tile and tokens past the end write nothing, or zeros; all lanes come along for the shuffles.
    router_gradient<lanes>(r, begin + slot, live && slot < share.tile, slot < share.tile ? share.padded : 0,
                           dlogits + min(slot, share.tile - 1) * share.padded);
  }
}

// What torch's add_ makes of two tensors: both parts are rounded before they are added.
template <class S>
__device__ __forceinline__ void store_dx(S* dx, bool add, float (&values)[4]) {
  if (add) {
    float before[4];
    load4(dx, before);
#pragma unroll
    for (int c = 0; c < 4; ++c) values[c] = before[c] + wide(narrow<S>(values[c]));
  }
  store4(dx, values);
}

// Grid: (chunks, columns, experts). partials (chunks, E, H).
template <class S, int N>
__global__ void __launch_bounds__(kBwdThreads)
    gating_bwd_products(RouterGradient r, Share share, const S* x, S* __restrict__ dx, bool add,
                        float* __restrict__ partials) {
  take_turn();
  MOE_DYNAMIC_SHARED(memory);
  float* dlogits = reinterpret_cast<float*>(memory);
  const int64_t h = 4 * (int64_t(blockIdx.y) * blockDim.x + threadIdx.x);
  const int first_expert = blockIdx.z * N;
  const int64_t chunk_begin = blockIdx.x * share.chunk, chunk_end = min(chunk_begin + share.chunk, r.T);
  float dweight[N][4] = {};
  for (int64_t begin = chunk_begin; begin < chunk_end; begin += share.tile) {
    const int count = int(min(int64_t(share.tile), chunk_end - begin));
    __syncthreads();
    tile_gradient(r, share, begin, chunk_end, dlogits);
    __syncthreads();
    if (h >= r.H) continue;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      float token[4];
      load4(x + (begin + i) * r.H + h, token);
      add_outer(dlogits + i * share.padded + first_expert, token, dweight);
    }
    for (int i = 0; i < count; i += kTogether) {
      if (unsigned(begin + i) / kTogether % gridDim.z != blockIdx.z) continue;
      float sums[kTogether][4];
      weigh_experts(r, dlogits + i * share.padded, share.padded, h, sums);
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        if (i + j < count) store_dx(dx + (begin + i + j) * r.H + h, add, sums[j]);
    }
  }
  if (h < r.H) store_dweight(partials + int64_t(blockIdx.x) * r.E * r.H, r.E, r.H, first_expert, h, dweight);
}

}  // namespace

void widen_weight(Dtype dtype, int64_t n, const void* weight, float* out, cudaStream_t stream) {
  const dim3 blocks(unsigned(ceil_div(n, kFwdThreads)));
  with_dtype(dtype, [&](auto element) {
    using W = decltype(element);
    launch(gating_fwd_widen<W>, blocks, kFwdThreads, 0, stream, n, static_cast<const W*>(weight), out);
  });
}

void gating_fwd(const GatingSizes& s, const void* x, const float* weight, float* probs, float* topk_weights,
                int32_t* topk_ids, cudaStream_t stream) {
  const Router r{s.T, int(s.H), int(s.E), int(s.K), weight, probs, topk_weights, topk_ids};
  with_dtype(s.dtype, [&](auto element) { choose_gating_fwd(r, static_cast<const decltype(element)*>(x), stream); });
}

int64_t gating_bwd_workspace_bytes(const GatingSizes& s) { return share_of(s, 1, kBwdThreads).chunks * s.E * s.H * 4; }

void gating_bwd(const GatingSizes& s, const RouterUpstream& upstream, const void* x, const float* weight,
                const int32_t* topk_ids, const float* probs, const RouterGrads& grads, void* workspace,
                cudaStream_t stream) {
  const Share share = share_of(s, 1, kBwdThreads);
  const RouterGradient r{s.T, int(s.H), int(s.E), int(s.K), upstream, topk_ids, probs, weight};
  float* partials = static_cast<float*>(workspace);
  const dim3 blocks(unsigned(share.chunks), share.cut.blocks, share.expert_blocks);
  const size_t shared = size_t(share.tile) * share.padded * sizeof(float);
  with_dtype(s.dtype, [&](auto element) {
    using S = decltype(element);
    const auto kernel = share.experts == 8 ? gating_bwd_products<S, 8> : gating_bwd_products<S, 16>;
    launch(kernel, blocks, share.cut.threads, shared, stream, r, share, static_cast<const S*>(x),
           static_cast<S*>(grads.dx), grads.add, partials);
  });
  ordered_sum(partials, share.chunks, s.E * s.H, grads.dweight, grads.dweight_dtype, stream);
}

}  // namespace moe::cuda
