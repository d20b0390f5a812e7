// Grouped products from Ampere on: mma.sync in bf16, fp16 and TF32, operands by cp.async in a ring of three stages.
// A block of eight warps works on a 128 x 128 tile, a warp on 32 rows and 64 columns (32 of each half of two).
#pragma once
#include <algorithm>

#include "engine.h"
#include "engines.h"

namespace moe::cuda::sm80 {

constexpr int kM = 128, kN = 128, kThreads = 256, kStages = 3, kOperandBytes = kM * kLine,
              kStageBytes = 2 * kOperandBytes;
constexpr int kWarpM = 32, kWarpN = 64, kSteps = kLine / 32;  // products of a stage: 32 bytes of what is summed over
constexpr int kSharedBytes = 99 * 1024;                       // of a block on every GPU from sm_80 on

// B: one operand of kN, or of two halves.
template <class Product>
struct LoaderB {
  using T = typename Product::T;
  static constexpr int kSize = kN / Product::kHalves;
  using One = Loader<T, Product::kB, kSize, kThreads>;
  One first;
  One second;
  __device__ LoaderB(const Product& product, const Tile& tile, int n)
      : first(product.b(tile, 0), n, tile.k_begin), second(product.b(tile, Product::kHalves - 1), n, tile.k_begin) {}
  __device__ void load(char* shared, int k, int step) {
    first.load(shared, k, step);
    if (Product::kHalves == 2) second.load(shared + kSize * kLine, k, step);
  }
};

// The fragment of 16 rows (from `row`) at step `step`: rows 0-7 and 8-15 of the first 16 bytes, then of the second.
template <class T, Summed LIES>
__device__ void load_a(unsigned (&to)[4], const char* operand, int row, int step) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (LIES == Summed::kInner) {
    load_matrices(to, operand + swizzled(row + lane % 16, step * 32 + lane / 16 * kChunk));
  } else if constexpr (sizeof(T) == 2) {
    const int m = row + lane / 8 % 2 * 8, k = step * 16 + lane / 16 * 8 + lane % 8;
    load_transposed(to, operand + m / 64 * (64 * kLine) + swizzled(k, m % 64 * 2));
  } else {  // 32-bit elements cannot be transposed by ldmatrix
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = row + lane / 4 + i % 2 * 8, k = step * 8 + lane % 4 + i / 2 * 4;
      to[i] = *reinterpret_cast<const unsigned*>(operand + m / 32 * (32 * kLine) + swizzled(k, m % 32 * 4));
    }
  }
  if constexpr (sizeof(T) == 4)
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = round_tf32(to[i]);
}

// The fragments of 16 columns (from `col`): of columns 0-7 the first and the second 16 bytes, then of columns 8-15.
template <class T, Summed LIES>
__device__ void load_b(unsigned (&to)[4], const char* operand, int col, int step) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (LIES == Summed::kInner) {
    load_matrices(to, operand + swizzled(col + lane / 16 * 8 + lane % 8, step * 32 + lane / 8 % 2 * kChunk));
  } else if constexpr (sizeof(T) == 2) {
    const int n = col + lane / 16 * 8, k = step * 16 + lane / 8 % 2 * 8 + lane % 8;
    load_transposed(to, operand + n / 64 * (64 * kLine) + swizzled(k, n % 64 * 2));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = col + lane / 4 + i / 2 * 8, k = step * 8 + lane % 4 + i % 2 * 4;
      to[i] = *reinterpret_cast<const unsigned*>(operand + n / 32 * (32 * kLine) + swizzled(k, n % 32 * 4));
    }
  }
  if constexpr (sizeof(T) == 4)
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = round_tf32(to[i]);
}

// Column of the tile where 16 columns of a warp begin: with two halves its second 32 are of the second half.
template <class Product>
__device__ int column(int warp_n, int pair) {
  constexpr int kMine = kWarpN / Product::kHalves;
  const int col = pair * 16;
  return col / kMine * (kN / Product::kHalves) + warp_n * kMine + col % kMine;
}

template <class Product>
__device__ void multiply_stage(const char* a, const char* b, int warp_m, int warp_n, float (&sums)[2][kWarpN / 2]) {
  using T = typename Product::T;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    unsigned rows[2][4];
#pragma unroll
    for (int block = 0; block < 2; ++block) load_a<T, Product::kA>(rows[block], a, warp_m * kWarpM + block * 16, step);
#pragma unroll
    for (int pair = 0; pair < kWarpN / 16; ++pair) {
      unsigned columns[4];
      load_b<T, Product::kB>(columns, b, column<Product>(warp_n, pair), step);
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        multiply<T>(&sums[block][8 * pair], rows[block], columns);
        multiply<T>(&sums[block][8 * pair + 4], rows[block], columns + 2);
      }
    }
  }
}

template <class Product>
__device__ void multiply_tile(const Product& product, const Tile& tile, char* memory, int warp_m, int warp_n,
                              float (&sums)[2][kWarpN / 2]) {
  using T = typename Product::T;
  constexpr int kK = kLineElements<T>;
  const int steps = int(ceil_div(tile.k_end - tile.k_begin, kK));
  Loader<T, Product::kA, kM, kThreads> a(product.a(tile), tile.m * kM, tile.k_begin);
  LoaderB<Product> b(product, tile, tile.n * LoaderB<Product>::kSize);
  const auto load = [&](int step) {
    char* stage = memory + step % kStages * kStageBytes;
    const int k = tile.k_begin + step * kK;
    if (step < steps) {
      product.enter(tile, k, b.first.matrix);
      a.load(stage, k, step), b.load(stage + kOperandBytes, k, step);
    }
    commit_chunks();
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    wait_chunks<kStages - 2>();
    __syncthreads();  // everybody's copies of this step have landed, and the stage before is free
    load(step + kStages - 1);
    const char* stage = memory + step % kStages * kStageBytes;
    multiply_stage<Product>(stage, stage + kOperandBytes, warp_m, warp_n, sums);
  }
  wait_chunks<0>();
  __syncthreads();
}

// Whether there is an index is known when this is compiled: told apart at run time it took the stacked kernels from 127
// registers to 168 (bf16 rows times weights), and one block a processor instead of two.
template <class Product, bool INDEXED>
__global__ void __launch_bounds__(kThreads) product_sm80(const Product given) {
  Product product = given;
  if constexpr (Product::kA == Summed::kInner && !INDEXED) product.from.index = nullptr;
  MOE_DYNAMIC_SHARED(memory);
  int* table = reinterpret_cast<int*>(memory + kStages * kStageBytes);
  wait_for_predecessor();
  product.tiles.template prepare<kM>(table);
  const int count = product.tiles.template count<kM>(table);
  const int warp = threadIdx.x / kWarp, warp_m = warp / 2, warp_n = warp % 2;
  for (int index = blockIdx.x; index < count; index += gridDim.x) {
    Tile tile = product.tiles.template locate<kM>(table, index);
    product.sum_range(tile);
    float sums[2][kWarpN / 2] = {};
    multiply_tile(product, tile, memory, warp_m, warp_n, sums);
    const int col = tile.n * LoaderB<Product>::kSize + column<Product>(warp_n, 0);
#pragma unroll
    for (int block = 0; block < 2; ++block)
      store_accumulators<Product, kWarpN>(product, tile, tile.m * kM + warp_m * kWarpM + block * 16, col, sums[block]);
  }
}

template <bool INDEXED, class Product>
void run_kernel(const Product& product, const Launch& on) {
  const int shared = kStages * kStageBytes + int(sizeof(int)) * Product::Tiles::table_size(product.tiles.groups.E);
  MOE_CHECK(shared <= kSharedBytes, "experts: ", product.tiles.groups.E, ", which need ", shared,
            " bytes of shared memory, expected at most ", kSharedBytes);
  launch(product_sm80<Product, INDEXED>, dim3(unsigned(std::min(on.tiles, on.device.processors))), kThreads,
         size_t(shared), on.stream, product);
}

template <class Product>
void run(const Product& product, const Launch& on) {
  if constexpr (Product::kA == Summed::kInner)
    if (product.from.index) return run_kernel<true>(product, on);
  run_kernel<false>(product, on);
}

}  // namespace moe::cuda::sm80
