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
//
// Rows that lie kOuter are others in every step, and where they are is as far away as they are themselves: a lane looks
// one up, its warp has those of kHeld steps then, and they are asked for so many steps ahead. Looked up step by step, a
// step took as long as a load: 1250 cycles on an H100, at XL/2, for products of 768 and of 1024.
template <class T, Summed LIES, int SIZE, int THREADS>
struct Loader {
  static constexpr bool kInner = LIES == Summed::kInner;
  static constexpr int kDepth = kLineElements<T>, kLines = kInner ? SIZE : kDepth, kSlabs = kInner ? 1 : SIZE / kDepth;
  static constexpr int kMine = kLines * 8 / THREADS, kHeld = kInner ? 1 : kWarp / (4 * kMine);  // a warp: 4 kMine lines
  Matrix<T> matrix;
  int first, chunk, rows[kMine];  // rows: of this step, -1 where there is none
  int held = -1, ahead = -1;  // kOuter: a row for a lane, of these kHeld steps and of the next

  __device__ Loader(const Matrix<T>& from, int first_, int k)
      : matrix(from), first(first_), chunk(threadIdx.x % 8 * kChunk) {
    if constexpr (kInner) {
#pragma unroll
      for (int i = 0; i < kMine; ++i) rows[i] = live(first + line(i), look_up(first + line(i)));
    } else {
      ahead = look_up(k + lane_row());
    }
  }
  __device__ int line(int i) const { return threadIdx.x / 8 + i * (THREADS / 8); }
  __device__ int look_up(int r) const { return matrix.row_of && r < matrix.rows ? matrix.row_of[r] : r; }
  __device__ int live(int r, int found) const { return r < matrix.rows ? found : -1; }
  // The row that a lane looks up, from the first of kHeld steps on: of step lane / (4 kMine) the line that lane
  // 8 (lane % 4) of its warp has as number lane / 4 % kMine.
  __device__ int lane_row() const {
    const int lane = threadIdx.x % kWarp;
    return lane / (4 * kMine) * kDepth + threadIdx.x / kWarp * 4 + lane % 4 + lane / 4 % kMine * (THREADS / 8);
  }
  // `held` is computed of `ahead`, no copy of it: ptxas would make the copy as soon as the load has come.
  __device__ void find_rows(int k, int at) {
    if (at == 0) held = live(k + lane_row(), ahead), ahead = look_up(k + kHeld * kDepth + lane_row());
#pragma unroll
    for (int i = 0; i < kMine; ++i)
      rows[i] = __shfl_sync(kAllLanes, held, (at * kMine + i) * 4 + threadIdx.x % kWarp / 8);
  }
  // Steps are 0, 1, ... while k ascends by kDepth; all lanes of a warp take part. What is not live is not read.
  __device__ void load(char* shared, int k, int step) {
    if constexpr (!kInner) find_rows(k, step % kHeld);
    const int col = (kInner ? k : first) + chunk / int(sizeof(T));
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const T* from = matrix.data + int64_t(rows[i]) * matrix.stride + col;
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab)
        load_chunk(shared + slab * kDepth * kLine + swizzled(line(i), chunk), from + slab * kDepth,
                   rows[i] >= 0 && col + slab * kDepth < matrix.cols);
    }
  }
};

// Lane q of four holds N words of each of four groups: words[N j], ... of group j. Afterwards it holds those that the
// four lanes had of group q, in their order.
template <class Word, int WORDS>
__device__ void gather_group(Word (&words)[WORDS]) {
  constexpr int N = WORDS / 4;
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = q & distance;
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      if (group & distance) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        Word& low = words[N * group + i];
        Word& high = words[N * (group + distance) + i];
        const Word got = __shfl_xor_sync(kAllLanes, upper ? low : high, distance);
        (upper ? low : high) = got;
      }
    }
  }
}

// Store pairs of columns as `gather_group` has them before it: eight contiguous columns a lane, where it is live. Two
// values of 16 bits travel as one word.
template <class T>
__device__ void store_gathered(T* to, const float (&pairs)[8], bool live) {
  if constexpr (sizeof(T) == 2) {
    struct __attribute__((may_alias, aligned(16))) Words {
      unsigned at[4];
    } words;
#pragma unroll
    for (int group = 0; group < 4; ++group)
      words.at[group] = narrow<T>(pairs[2 * group]).bits | unsigned(narrow<T>(pairs[2 * group + 1]).bits) << 16;
    gather_group(words.at);
    if (live) *reinterpret_cast<Words*>(to) = words;
  } else {
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = pairs[i];
    gather_group(values);
    if (live) store8(to, values);
  }
}

// Store 16 rows x N columns of a warp's accumulators: value 4 j + 2 h + i of a lane is row lane / 4 + 8 h, column
// 8 j + 2 (lane % 4) + i. Of a product with two halves the first N / 2 columns belong to the first.
// kColumnsFirst: a lane has its eight columns before the product sees them. What a step reads is on its way while the
// one before it is computed: after its stores the load would be waited for. Other products compute where the sums are,
// and only what they store moves, as 16 bits a value.
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
      const bool live = row < rows && col < width;
      const auto kept = ahead;
      if (step + 1 < 2 * kSlices) ahead = kept_of(step + 1);
      float values[Product::kHalves][8];
#pragma unroll
      for (int half = 0; half < Product::kHalves; ++half)
#pragma unroll
        for (int i = 0; i < 8; ++i)
          values[half][i] = sums[4 * (half * kColumns / 8 + slice * 4 + i / 2) + 2 * h + i % 2];
      const auto& last = values[Product::kHalves - 1];
      if constexpr (Product::kColumnsFirst) {
#pragma unroll
        for (int half = 0; half < Product::kHalves; ++half) gather_group(values[half]);
        if (live) row_sum += product.store(tile, row, col, values[0], last, kept, Store8{});
      } else {
        product.store(tile, row, col, values[0], last, kept,
                      [&](auto* to, const float (&pairs)[8]) { store_gathered(to, pairs, live); });
      }
    }
    if constexpr (Product::kRowSum) {
      row_sum += __shfl_xor_sync(kAllLanes, row_sum, 1);
      row_sum += __shfl_xor_sync(kAllLanes, row_sum, 2);
      if (lane % 4 == 0 && row < rows) product.finish_row(tile, row, first_col, row_sum);
    }
  }
}

}  // namespace moe::cuda
