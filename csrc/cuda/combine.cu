#include "combine.h"

#include <algorithm>

#include "columns.h"
#include "device.h"
#include "sums.h"

namespace moe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 4;  // rows of a token whose loads are under way together

// A block holds tokens_per_block x vectors threads, each with 8 columns; gridDim.y blocks share a row.
struct Grid {
  int vectors, tokens_per_block;
  unsigned part_blocks;  // the first ones of the grid only sum parts
};

// drow_weight of the rows of token t: each row belongs to one token.
__device__ void sum_parts(const CombineArgs& a, int64_t t) {
  if (t >= a.T) return;
  for (int64_t j = a.token_row_offsets[t]; j < a.token_row_offsets[t + 1]; ++j) {
    const int64_t row = a.token_rows[j];
    const float* parts = a.parts + row * a.num_parts;
    float total = 0;
#pragma unroll 8
    for (int64_t part = 0; part < a.num_parts; ++part) total += parts[part];
    a.drow_weight[a.row_pick ? a.row_pick[row] : row] = total;
  }
}

// total += row_weight * row over the rows of token t, ascending, columns h to h + 7.
template <class S>
__device__ void add_rows(const CombineArgs& a, int64_t t, int64_t h, float (&total)[8]) {
  const int end = a.token_row_offsets[t + 1];
  for (int first = a.token_row_offsets[t]; first < end; first += kAhead) {
    Eight<S> rows[kAhead];
    float weights[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= end) break;
      const int64_t row = a.token_rows[first + i];
      weights[i] = a.row_weight ? a.row_weight[row] : 1.f;
      rows[i] = *reinterpret_cast<const Eight<S>*>(static_cast<const S*>(a.rows) + row * a.H + h);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= end) break;
#pragma unroll
      for (int c = 0; c < 8; ++c) total[c] += weights[i] * wide(rows[i].at[c]);
    }
  }
}

// out[t] = sum of row_weight * row, + shared[t]; gated: y = that, and out = residual + gate_b y. S: dtype of rows,
// D: of the residual. Grid: (blocks that sum parts + tokens, columns).
template <class S, class D, bool gated>
__global__ void __launch_bounds__(kThreads) combine_fwd_rows(CombineArgs a, Grid grid, unsigned tokens_per_image) {
  take_turn();
  if (blockIdx.x < grid.part_blocks) {
    if (blockIdx.y == 0) sum_parts(a, int64_t(blockIdx.x) * blockDim.x + threadIdx.x);
    return;
  }
  const int slot = int(threadIdx.x) / grid.vectors;
  const int64_t t = int64_t(blockIdx.x - grid.part_blocks) * grid.tokens_per_block + slot;
  const int64_t h = 8 * (int64_t(blockIdx.y) * grid.vectors + int(threadIdx.x) % grid.vectors);
  if (slot >= grid.tokens_per_block || t >= a.T || h >= a.H) return;
  const int64_t at = t * a.H + h;
  float shared[8], total[8] = {};
  if (a.shared) load8(static_cast<const S*>(a.shared) + at, shared);
  add_rows<S>(a, t, h, total);
  if (a.shared)
    for (int c = 0; c < 8; ++c) total[c] += shared[c];
  if constexpr (gated) {
    float residual[8], gate[8];
    load8(static_cast<const D*>(a.residual) + at, residual);
    AnyFloats{a.gate, a.gate_dtype}.load(int64_t(unsigned(t) / tokens_per_image) * a.H + h, gate);
    store8(static_cast<S*>(a.y) + at, total);
    for (int c = 0; c < 8; ++c) total[c] = residual[c] + gate[c] * total[c];
    store8(static_cast<D*>(a.out) + at, total);
  } else {
    store8(static_cast<S*>(a.out) + at, total);
  }
}

// A warp per row: dy_rows = row_weight dout[token], drow_weight = dout[token] . y_rows.
template <class S>
__global__ void __launch_bounds__(kThreads)
    combine_bwd_rows(int64_t R, int64_t H, const int32_t* row_token, const float* row_weight, const S* dout,
                     const S* y_rows, S* __restrict__ dy_rows, float* __restrict__ drow_weight) {
  take_turn();
  const int lane = threadIdx.x % kWarp;
  const int64_t r = int64_t(blockIdx.x) * (kThreads / kWarp) + int(threadIdx.x) / kWarp;
  if (r >= R) return;
  const S* upstream = dout + row_token[r] * H;
  const float weight = row_weight[r];
  float product = 0;
#pragma unroll 2
  for (int64_t h = 8 * lane; h < H; h += 8 * kWarp) {
    float gradient[8], y[8];
    load8(upstream + h, gradient);
    load8(y_rows + r * H + h, y);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      product += gradient[c] * y[c];
      gradient[c] *= weight;
    }
    store8(dy_rows + r * H + h, gradient);
  }
  product = warp_sum(product);
  if (lane == 0) drow_weight[r] = product;
}

struct ImageChunks {
  int64_t tokens_per_image, chunk;  // an image is cut in chunks of consecutive tokens
  unsigned chunks;
};

// Chunks short enough for many blocks, long enough that the partial sums are few.
ImageChunks image_chunks(int64_t B, int64_t T) {
  const int64_t L = B > 0 ? T / B : 0;
  const int64_t chunk = std::max(std::clamp<int64_t>(T / 256, 4, 32), ceil_div(L, 256));
  return {L, chunk, unsigned(ceil_div(L, chunk))};
}

// dy = gate_b dout; partials (chunks, B, H) = sums of dout y over a chunk's tokens. D: dtype of dout, S: of y.
// Grid: (images x chunks, columns), a thread has 8 columns.
template <class D, class S>
__global__ void __launch_bounds__(kThreads, 2)
    combine_bwd_gate(ImageChunks c, int64_t B, int64_t H, const D* dout, const S* y, AnyFloats gate, S* __restrict__ dy,
                     float* __restrict__ partials) {
  take_turn();
  const int64_t h = 8 * (int64_t(blockIdx.y) * blockDim.x + threadIdx.x);
  if (h >= H) return;
  const unsigned image = blockIdx.x / c.chunks, part = blockIdx.x % c.chunks;
  const int64_t begin = image * c.tokens_per_image + part * c.chunk;
  const int64_t end = min(begin + c.chunk, (image + int64_t(1)) * c.tokens_per_image);
  float factor[8], total[8] = {};
  gate.load(int64_t(image) * H + h, factor);
#pragma unroll 4
  for (int64_t t = begin; t < end; ++t) {
    float gradient[8], output[8];
    load8(dout + t * H + h, gradient);
    load8(y + t * H + h, output);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      total[i] += gradient[i] * output[i];
      gradient[i] *= factor[i];
    }
    store8(dy + t * H + h, gradient);
  }
  store8(partials + (part * B + image) * H + h, total);
}

template <class S, class D, bool gated>
void launch_combine_fwd(const CombineArgs& a, cudaStream_t stream) {
  const Columns cut = cut_columns(a.H / 8, kThreads);
  Grid grid;
  grid.vectors = int(ceil_div(a.H / 8, cut.blocks));
  grid.tokens_per_block = std::max(1, kThreads / grid.vectors);
  const int threads = int(ceil_div(grid.vectors * grid.tokens_per_block, kWarp)) * kWarp;
  grid.part_blocks = a.parts ? unsigned(ceil_div(a.T, threads)) : 0;
  const dim3 blocks(grid.part_blocks + unsigned(ceil_div(a.T, grid.tokens_per_block)), cut.blocks);
  const unsigned tokens_per_image = gated && a.B > 0 ? std::max(unsigned(a.T / a.B), 1u) : 1;
  launch(combine_fwd_rows<S, D, gated>, blocks, threads, 0, stream, a, grid, tokens_per_image);
}

}  // namespace

void combine_fwd(const CombineArgs& a, cudaStream_t stream) {
  with_dtype(a.dtype, [&](auto element) {
    using S = decltype(element);
    if (!a.residual) return launch_combine_fwd<S, S, false>(a, stream);
    with_dtype(a.residual_dtype, [&](auto outer) { launch_combine_fwd<S, decltype(outer), true>(a, stream); });
  });
}

void combine_bwd(int64_t R, int64_t H, Dtype dtype, const int32_t* row_token, const float* row_weight, const void* dout,
                 const void* y_rows, void* dy_rows, float* drow_weight, cudaStream_t stream) {
  with_dtype(dtype, [&](auto element) {
    using S = decltype(element);
    launch(combine_bwd_rows<S>, dim3(unsigned(ceil_div(R, kThreads / kWarp))), kThreads, 0, stream, R, H, row_token,
           row_weight, static_cast<const S*>(dout), static_cast<const S*>(y_rows), static_cast<S*>(dy_rows),
           drow_weight);
  });
}

int64_t gated_residual_bwd_workspace_bytes(int64_t B, int64_t T, int64_t H) {
  return image_chunks(B, T).chunks * B * H * 4;
}

void gated_residual_bwd(int64_t B, int64_t T, int64_t H, Dtype dtype, Dtype y_dtype, Dtype gate_dtype, const void* dout,
                        const void* y, const void* gate, void* dy, void* dgate, void* workspace, cudaStream_t stream) {
  const ImageChunks chunks = image_chunks(B, T);
  const Columns cut = cut_columns(H / 8, kThreads);
  const dim3 blocks(unsigned(B * chunks.chunks), cut.blocks);
  float* partials = static_cast<float*>(workspace);
  with_dtype(dtype, [&](auto outer) {
    with_dtype(y_dtype, [&](auto element) {
      using D = decltype(outer);
      using S = decltype(element);
      launch(combine_bwd_gate<D, S>, blocks, cut.threads, 0, stream, chunks, B, H, static_cast<const D*>(dout),
             static_cast<const S*>(y), AnyFloats{gate, gate_dtype}, static_cast<S*>(dy), partials);
    });
  });
  ordered_sum(partials, chunks.chunks, B * H, dgate, gate_dtype, stream);
}

}  // namespace moe::cuda
