// Grouped products without tensor cores, in IEEE fp32, for any architecture: 128 x 64 tiles, 4 x 8 results a thread.
#pragma once
#include <algorithm>

#include "engines.h"
#include "products.h"

namespace moe::cuda::simt {

constexpr int kThreads = 256, kM = 128, kN = 64, kK = 16, kPad = 4;
constexpr int kFlush = 64;  // longer sums are kept in two levels: sums of 512 in one had twice the error of torch's

// Eight elements of a matrix, zeros outside of it.
template <class T>
__device__ inline void fetch(const Matrix<T>& matrix, int row, int col, float (&values)[8]) {
  if (row < matrix.rows && col < matrix.cols) {
    load8(matrix.row(row) + col, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = 0;
}

// The share of one thread in a block of `SIZE` x kK elements of an operand, on its way from global to shared memory.
template <Summed LIES, int SIZE>
struct Share {
  static constexpr bool kInner = LIES == Summed::kInner;
  static constexpr int kPerRow = (kInner ? kK : SIZE) / 8;  // threads side by side
  int row, col;
  bool mine;
  float values[8];

  __device__ Share() : row(threadIdx.x / kPerRow), col(threadIdx.x % kPerRow * 8), mine(threadIdx.x < SIZE * kK / 8) {}
  template <class T>
  __device__ void fetch_from(const Matrix<T>& matrix, int first, int k) {
    if (mine) fetch(matrix, kInner ? first + row : k + row, kInner ? k + col : first + col, values);
  }
  __device__ void put_into(float (*shared)[SIZE + kPad], int offset) const {
    if (!mine) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) (kInner ? shared[col + i][offset + row] : shared[row][offset + col + i]) = values[i];
  }
};

// B of a product with two halves is one block, N / 2 columns of each.
template <class Product>
struct ShareB : Share<Product::kB, kN> {
  template <class T>
  __device__ void fetch_half(const Matrix<T> (&halves)[Product::kHalves], int first, int k) {
    if constexpr (Product::kHalves == 1) {
      this->fetch_from(halves[0], first, k);
    } else {
      static_assert(Product::kB == Summed::kInner);
      const bool second = this->row >= kN / 2;
      Matrix<T> half = halves[0];
      half.data = second ? halves[1].data : halves[0].data;
      if (this->mine) fetch(half, first + this->row - second * (kN / 2), k + this->col, this->values);
    }
  }
};

template <class Product>
__device__ void store(const Product& product, const Tile& tile, int row, int col, bool live, float (&values)[8]) {
  constexpr int kLanes = kN / 8;
  float up[8];
  if constexpr (Product::kHalves == 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) up[i] = __shfl_xor_sync(kAllLanes, values[i], kLanes / 2);
    live = live && threadIdx.x % kLanes < kLanes / 2;
  }
  float sum = 0;
  if (live)
    sum = product.store(tile, row, col, values, Product::kHalves == 2 ? up : values, product.kept(tile, row, col),
                        Store8{});
  if constexpr (Product::kRowSum) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    if (threadIdx.x % kLanes == 0 && row < result_rows(product, tile)) product.finish_row(tile, row, col, sum);
  }
}

template <class Product>
__global__ void __launch_bounds__(kThreads, 1) product_simt(const Product product) {
  using T = typename Product::T;
  MOE_DYNAMIC_SHARED(dynamic);
  int* table = reinterpret_cast<int*>(dynamic);
  __shared__ float a_block[kK][kM + kPad], b_block[kK][kN + kPad];
  wait_for_predecessor();
  product.tiles.template prepare<kM>(table);
  const int count = product.tiles.template count<kM>(table), row0 = threadIdx.x / 8 * 4, col0 = threadIdx.x % 8 * 8;
  for (int index = blockIdx.x; index < count; index += gridDim.x) {
    Tile tile = product.tiles.template locate<kM>(table, index);
    product.sum_range(tile);
    const Matrix<T> a = product.a(tile);
    Matrix<T> b[Product::kHalves];
#pragma unroll
    for (int half = 0; half < Product::kHalves; ++half) b[half] = product.b(tile, half);
    const int m = tile.m * kM, n = tile.n * (kN / Product::kHalves);
    Share<Product::kA, kM> a_share;
    ShareB<Product> b_share;
    float sums[4][8] = {}, totals[4][8] = {};
    a_share.fetch_from(a, m, tile.k_begin), b_share.fetch_half(b, n, tile.k_begin);
    for (int k = tile.k_begin; k < tile.k_end; k += kK) {
      a_share.put_into(a_block, 0), b_share.put_into(b_block, 0);
      __syncthreads();
      product.enter(tile, k + kK, b[0]);
      a_share.fetch_from(a, m, k + kK), b_share.fetch_half(b, n, k + kK);
#pragma unroll
      for (int step = 0; step < kK; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 8; ++j) sums[i][j] += a_block[step][row0 + i] * b_block[step][col0 + j];
      __syncthreads();
      if ((k + kK - tile.k_begin) % kFlush == 0 || k + kK >= tile.k_end)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 8; ++j) totals[i][j] += sums[i][j], sums[i][j] = 0;
    }
    const int col = n + col0 % (kN / Product::kHalves);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = m + row0 + i;
      store(product, tile, row, col, row < result_rows(product, tile) && col < product.width(tile), totals[i]);
    }
  }
}

template <class Product>
void run(const Product& product, const Launch& on) {
  const size_t table = sizeof(int) * Product::Tiles::table_size(product.tiles.groups.E);
  launch(product_simt<Product>, dim3(unsigned(std::min(on.tiles, on.device.processors))), kThreads, table, on.stream,
         product);
}

}  // namespace moe::cuda::simt
