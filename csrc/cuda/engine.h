// What the engines with tensor cores share: from the layout of an mma's accumulators to rows that lie contiguous.
#pragma once
#include "ampere.h"
#include "products.h"

namespace moe::cuda {

// Shared memory holds operands in lines of 128 bytes; the 16-byte chunks of line r are permuted by r mod 8, so that
// eight lines are read without bank conflicts ("128B swizzle" of TMA and wgmma).
constexpr int kLine = 128, kChunk = 16;
__host__ __device__ inline int swizzled(int line, int byte) { return line * kLine + (byte ^ (line % 8 * kChunk)); }

template <class T>
constexpr int kLineElements = kLine / int(sizeof(T));

// One thread's share in copying an operand of SIZE rows (kInner) or columns (kOuter) by a step of kLineElements of what
// is summed over. In shared memory: SIZE lines of a row each, or slabs of kLineElements columns with a line a row.
template <class T, Summed LIES, int SIZE, int THREADS>
struct Loader {
  static constexpr bool kInner = LIES == Summed::kInner;
  static constexpr int kDepth = kLineElements<T>, kLines = kInner ? SIZE : kDepth, kSlabs = kInner ? 1 : SIZE / kDepth;
  static constexpr int kMine = kLines * 8 / THREADS;
  Matrix<T> matrix;
  int first, chunk, rows[kMine];  // rows: of this step, -1 where there is none

  __device__ Loader(const Matrix<T>& from, int first_, int k)
      : matrix(from), first(first_), chunk(threadIdx.x % 8 * kChunk) {
    look_up(kInner ? first : k);
  }
  __device__ int line(int i) const { return threadIdx.x / 8 + i * (THREADS / 8); }
  __device__ void look_up(int row) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int r = row + line(i);
      rows[i] = r >= matrix.rows ? -1 : matrix.row_of ? matrix.row_of[r] : r;
    }
  }
  // Steps ascend by kDepth.
  __device__ void load(char* shared, int k) {
#pragma unroll
    for (int i = 0; i < kMine; ++i)
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        const int col = (kInner ? k : first + slab * kDepth) + chunk / int(sizeof(T));
        const bool live = rows[i] >= 0 && col < matrix.cols;
        const T* from = live ? matrix.data + int64_t(rows[i]) * matrix.stride + col : matrix.data;
        load_chunk(shared + slab * kDepth * kLine + swizzled(line(i), chunk), from, live);
      }
    if (!kInner) look_up(k + kDepth);
  }
};

// Lane q of four holds two columns of each of four groups of eight: pairs[2 j], pairs[2 j + 1] of group j. Afterwards
// it holds the eight columns of group q.
__device__ inline void gather_columns(float (&pairs)[8]) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = q & distance;
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      if (group & distance) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& low = pairs[2 * group + i];
        float& high = pairs[2 * (group + distance) + i];
        const float got = __shfl_xor_sync(kAllLanes, upper ? low : high, distance);
        (upper ? low : high) = got;
      }
    }
  }
}

// Store 16 rows x N columns of a warp's accumulators: value 4 j + 2 h + i of a lane is row lane / 4 + 8 h, column
// 8 j + 2 (lane % 4) + i. Of a product with two halves the first N / 2 columns belong to the first.
// What a step reads is on its way while the one before it is computed: after its stores the load would be waited for.
template <class Product, int N>
__device__ void store_accumulators(const Product& product, const Tile& tile, int first_row, int first_col,
                                   const float (&sums)[N / 2]) {
  constexpr int kColumns = N / Product::kHalves;
  static_assert(kColumns % 32 == 0);
  constexpr int kSlices = kColumns / 32;
  const int lane = threadIdx.x % kWarp, width = product.width(tile), rows = result_rows(product, tile);
  const auto row_of = [&](int step) { return first_row + lane / 4 + 8 * (step / kSlices); };
  const auto col_of = [&](int step) { return first_col + 32 * (step % kSlices) + 8 * (lane % 4); };
  const auto kept_of = [&](int step) {
    const int row = row_of(step), col = col_of(step);
    return row < rows && col < width ? product.kept(tile, row, col) : typename Product::Kept{};
  };
  auto ahead = kept_of(0);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = row_of(h * kSlices);
    float row_sum = 0;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      const int step = h * kSlices + slice, col = col_of(step);
      const auto kept = ahead;
      if (step + 1 < 2 * kSlices) ahead = kept_of(step + 1);
      float values[Product::kHalves][8];
#pragma unroll
      for (int half = 0; half < Product::kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          values[half][i] = sums[4 * (half * kColumns / 8 + slice * 4 + i / 2) + 2 * h + i % 2];
        gather_columns(values[half]);
      }
      if (row < rows && col < width)
        row_sum += product.store(tile, row, col, values[0], values[Product::kHalves - 1], kept);
    }
    if constexpr (Product::kRowSum) {
      row_sum += __shfl_xor_sync(kAllLanes, row_sum, 1);
      row_sum += __shfl_xor_sync(kAllLanes, row_sum, 2);
      if (lane % 4 == 0 && row < rows) product.finish_row(tile, row, first_col, row_sum);
    }
  }
}

}  // namespace moe::cuda
