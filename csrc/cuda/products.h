// The four grouped products of the experts room: what they multiply, which tile comes when, what becomes of a tile.
// How a tile is multiplied is the business of the engines (engine_simt.h, engine_sm80.h, engine_sm90.h).
#pragma once
#include "../core/shapes.h"
#include "activation.h"
#include "device.h"

namespace moe::cuda {

// A matrix in global memory, rows contiguous; row r of it is row row_of[r] of what lies at data, where row_of is given.
template <class T>
struct Matrix {
  const T* data;
  int stride;
  const int32_t* row_of;
  int rows, cols;

  __device__ const T* row(int r) const { return data + int64_t(row_of ? row_of[r] : r) * stride; }
};

// How an operand lies: kInner, rows of the tile with what is summed over contiguous; kOuter, the other way round.
enum class Summed { kInner, kOuter };
enum class Gathered { kNone, kA, kB };

// The routed experts are groups 0..E-1, the shared expert is group E: its rows are the T tokens.
struct Groups {
  int E;
  int T;  // 0 where there is no shared expert
  const int32_t* expert_offsets;

  __device__ int first(int group) const { return group == E ? 0 : expert_offsets[group]; }
  __device__ int rows(int group) const { return group == E ? T : expert_offsets[group + 1] - expert_offsets[group]; }
};

// One tile of one group: block (m, n) of the result, elements [k_begin, k_end) of what is summed over.
struct Tile {
  int group, m, n, part;
  int first, rows;  // of the group
  int k_begin, k_end;
  bool shared;
};

// What the end of a product reads beside its sums: nothing, or Kept of the product. Engines ask one step ahead.
struct Nothing {};

// How a product stores eight of its results in a row: as they are, or an engine's own way.
struct Store8 {
  template <class T>
  __device__ void operator()(T* to, const float (&values)[8]) const {
    store8(to, values);
  }
};

constexpr int kBand = 8;  // tiles in m that come for one n before the next: neighbours in time share operands

// Tile `index` of num_m x num_n, n slower than m in bands.
__device__ inline void order_tiles(int index, int num_m, int num_n, Tile& tile) {
  const int band = index / (kBand * num_n), within = index % (kBand * num_n);
  const int size = min(num_m - band * kBand, kBand);
  tile.m = band * kBand + within % size;
  tile.n = within / size;
}

// Rows of a group times its weights. Tiles: expert by expert, then the shared expert.
struct RowTiles {
  Groups groups;
  int num_n, shared_num_n;

  __host__ __device__ static int table_size(int E) { return E + 1; }

  // table[e]: tiles in m of the experts before e. Every thread of the block takes part.
  template <int BLOCK_M>
  __device__ void prepare(int* table) const {
    for (int e = threadIdx.x; e <= groups.E; e += blockDim.x) {
      int tiles = 0;
      for (int before = 0; before < e; ++before) tiles += int(ceil_div(groups.rows(before), BLOCK_M));
      table[e] = tiles;
    }
    __syncthreads();
  }

  template <int BLOCK_M>
  __device__ int count(const int* table) const {
    return table[groups.E] * num_n + int(ceil_div(groups.T, BLOCK_M)) * shared_num_n;
  }

  template <int BLOCK_M>
  __device__ Tile locate(const int* table, int index) const {
    Tile tile{};
    const int routed = table[groups.E] * num_n;
    tile.shared = index >= routed;
    int low = 0, high = groups.E;  // the last group that starts at or before the tile; empty ones start where they end
    while (!tile.shared && high - low > 1) {
      const int middle = (low + high) / 2;
      (table[middle] * num_n <= index ? low : high) = middle;
    }
    tile.group = tile.shared ? groups.E : low;
    tile.first = groups.first(tile.group), tile.rows = groups.rows(tile.group);
    order_tiles(tile.shared ? index - routed : index - table[low] * num_n, int(ceil_div(tile.rows, BLOCK_M)),
                tile.shared ? shared_num_n : num_n, tile);
    return tile;
  }
};

// Operands and result of a product with weights; of what is not used there are null pointers.
template <class T>
struct RowsTimesWeights {
  RowTiles tiles;
  const T* rows;  // (R, K), or (T, K) with row_token
  const T* shared_rows;  // (T, Ks)
  const int32_t* row_token;
  Weights from;  // slices (halves N, K), or (K, N); of an index (N, K), or (K / matrices, N)
  int matrices;  // of an expert
  int K, Ks, N, Ns;

  __device__ int width(const Tile& tile) const { return tile.shared ? Ns : N; }
  __device__ int depth(const Tile& tile) const { return tile.shared ? Ks : K; }
  __device__ void sum_range(Tile& tile) const { tile.k_begin = 0, tile.k_end = depth(tile); }
  __device__ Matrix<T> a(const Tile& tile) const {
    const int k = depth(tile);
    if (tile.shared) return {shared_rows, k, nullptr, tile.rows, k};
    if (row_token) return {rows, k, row_token + tile.first, tile.rows, k};
    return {rows + int64_t(tile.first) * k, k, nullptr, tile.rows, k};
  }
  // The slice that holds matrix `part` of a tile's expert.
  __device__ int slice(const Tile& tile, int part) const {
    if (from.index) return from.index[tile.group * matrices + part];
    return tile.shared ? 0 : tile.group;
  }
  template <Summed SUMMED>
  __device__ Matrix<T> weights(const Tile& tile, int part) const {
    const int n = width(tile), k = depth(tile);
    const void* data = tile.shared ? from.shared.data : from.routed.data;
    const int64_t step = tile.shared ? from.shared.step : from.routed.step;
    const T* first = static_cast<const T*>(data) + slice(tile, part) * step;
    if (SUMMED == Summed::kInner) return {first + (from.index ? 0 : int64_t(part) * n * k), k, nullptr, n, k};
    return {first, n, nullptr, k, n};
  }
  __device__ int split_of(const Tile&) const { return -1; }
  __device__ void enter(const Tile&, int, Matrix<T>&) const {}
};

// act_r = activation(x[token of r] gate_up_proj_e^T); gate_up is kept where it is not null.
template <class T_, bool GELU>
struct Up : RowsTimesWeights<T_> {
  using T = T_;
  using Tiles = RowTiles;
  using Kept = Nothing;
  static constexpr int kHalves = GELU ? 1 : 2;
  static constexpr Summed kA = Summed::kInner, kB = Summed::kInner;
  static constexpr Gathered kGathered = Gathered::kA;
  static constexpr bool kColumnsFirst = sizeof(T) == 4, kRowSum = false, kLongEpilogue = false;
  T* act;
  T* shared_act;
  T* gate_up;
  T* shared_gate_up;

  __device__ Matrix<T> b(const Tile& tile, int part) const {
    return this->template weights<Summed::kInner>(tile, part);
  }
  __device__ Kept kept(const Tile&, int, int) const { return {}; }
  template <class Store>
  __device__ float store(const Tile& tile, int row, int col, const float (&gate)[8], const float (&up)[8], const Kept&,
                         const Store& put) const {
    const int n = this->width(tile);
    const int64_t at = int64_t(tile.first) + row;
    T* kept = tile.shared ? shared_gate_up : gate_up;
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = activation<GELU, T>(gate[i], up[i]);
    put((tile.shared ? shared_act : act) + at * n + col, values);
    if (kept) {
      put(kept + at * (kHalves * n) + col, gate);
      if (!GELU) put(kept + at * (kHalves * n) + n + col, up);
    }
    return 0;
  }
  __device__ void finish_row(const Tile&, int, int, float) const {}
};

// out_r = rows_r W_e^T, W (N, K), or with kOuter rows_r W_e, W (K, N).
template <class T_, Summed WEIGHTS>
struct RowsTimes : RowsTimesWeights<T_> {
  using T = T_;
  using Tiles = RowTiles;
  using Kept = Nothing;
  static constexpr int kHalves = 1;
  static constexpr Summed kA = Summed::kInner, kB = WEIGHTS;
  static constexpr Gathered kGathered = Gathered::kNone;
  static constexpr bool kColumnsFirst = false, kRowSum = false, kLongEpilogue = false;
  T* out;
  T* shared_out;
  int split, shared_split;  // with an index: where K goes on in the second matrix of an expert, or -1

  __device__ Matrix<T> b(const Tile& tile, int) const { return this->template weights<WEIGHTS>(tile, 0); }
  __device__ int split_of(const Tile& tile) const {
    if (WEIGHTS == Summed::kInner || !this->from.index) return -1;
    return tile.shared ? shared_split : split;
  }
  // Called before each step of K, which ascend: rows k and following of b are then those of the matrix that holds them.
  __device__ void enter(const Tile& tile, int k, Matrix<T>& b) const {
    if (WEIGHTS == Summed::kOuter && k == split_of(tile))
      b.data = this->template weights<WEIGHTS>(tile, 1).data - int64_t(k) * b.stride;
  }
  __device__ Kept kept(const Tile&, int, int) const { return {}; }
  template <class Store>
  __device__ float store(const Tile& tile, int row, int col, const float (&values)[8], const float (&)[8], const Kept&,
                         const Store& put) const {
    put((tile.shared ? shared_out : out) + (int64_t(tile.first) + row) * this->width(tile) + col, values);
    return 0;
  }
  __device__ void finish_row(const Tile&, int, int, float) const {}
};

// dact' = dout_r down_proj_e; dgate_up = activation'(gate_up, w_r dact'); act = w_r activation(gate_up); parts
// (R, num_parts): the sums of dact' activation(gate_up) over part_columns columns each. Without row_weight w_r is 1,
// and there are no parts.
template <class T_, bool GELU>
struct Dact : RowsTimesWeights<T_> {
  using T = T_;
  using Tiles = RowTiles;
  struct Kept {
    Words8<T> gate, up;
    float row_weight;
  };
  static constexpr int kHalves = 1, kKeptHalves = GELU ? 1 : 2;
  static constexpr Summed kA = Summed::kInner, kB = Summed::kOuter;
  static constexpr Gathered kGathered = Gathered::kA;
  static constexpr bool kColumnsFirst = true, kRowSum = true;
  static constexpr bool kLongEpilogue = true;  // as long as its products: to be done beside them
  const float* row_weight;
  const T* gate_up;
  const T* shared_gate_up;
  T* dgate_up;
  T* shared_dgate_up;
  T* act;
  T* shared_act;
  float* parts;
  int part_columns, num_parts;

  __device__ Matrix<T> b(const Tile& tile, int) const { return this->template weights<Summed::kOuter>(tile, 0); }
  __device__ Kept kept(const Tile& tile, int row, int col) const {
    const int n = this->width(tile);
    const int64_t r = int64_t(tile.first) + row;
    const T* from = (tile.shared ? shared_gate_up : gate_up) + r * (kKeptHalves * n) + col;
    using Words = Words8<T>;
    return {*reinterpret_cast<const Words*>(from), GELU ? Words{} : *reinterpret_cast<const Words*>(from + n),
            tile.shared || !row_weight ? 1.0f : row_weight[r]};
  }
  template <class Store>
  __device__ float store(const Tile& tile, int row, int col, const float (&dact)[8], const float (&)[8],
                         const Kept& kept, const Store& put) const {
    const int n = this->width(tile);
    const int64_t r = int64_t(tile.first) + row, wide_at = r * (kKeptHalves * n) + col;
    const float weight = kept.row_weight;
    float gate[8], up[8], value[8], sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const ActivationGradient g =
          activation_bwd<GELU, T>(weight * dact[i], kept.gate.at(i), GELU ? 0.0f : kept.up.at(i));
      sum += dact[i] * g.act;
      value[i] = weight * g.act, gate[i] = g.dgate, up[i] = g.dup;
    }
    T* into = (tile.shared ? shared_dgate_up : dgate_up) + wide_at;
    put(into, gate);
    if (!GELU) put(into + n, up);
    put((tile.shared ? shared_act : act) + r * n + col, value);
    return sum;
  }
  __device__ void finish_row(const Tile& tile, int row, int col, float sum) const {  // col: the first that was summed
    if (!tile.shared && row_weight) parts[(int64_t(tile.first) + row) * num_parts + col / part_columns] = sum;
  }
};

// Products over the rows of a group. Its rows may be cut into parts, whose results are added in order afterwards.
// Tiles: the shared expert first, it has most rows, then the routed experts by falling number of rows.
struct WeightTiles {
  Groups groups;
  int num_m, num_n, split, shared_num_m, shared_num_n, shared_split;

  __host__ __device__ static int table_size(int E) { return E + 1; }

  template <int BLOCK_M>
  __device__ void prepare(int* table) const {  // the experts by falling number of rows
    for (int e = threadIdx.x; e < groups.E; e += blockDim.x) {
      int rank = 0;
      const int mine = groups.rows(e);
      for (int other = 0; other < groups.E; ++other) {
        const int rows = groups.rows(other);
        rank += rows > mine || (rows == mine && other < e);
      }
      table[rank] = e;
    }
    __syncthreads();
  }

  template <int BLOCK_M>
  __device__ int count(const int*) const {
    return groups.E * num_m * num_n * split + shared_num_m * shared_num_n * shared_split;
  }

  template <int BLOCK_M>
  __device__ Tile locate(const int* table, int index) const {
    Tile tile{};
    const int shared_tiles = shared_num_m * shared_num_n * shared_split, area = num_m * num_n;
    tile.shared = index < shared_tiles;
    index = tile.shared ? index : index - shared_tiles;
    tile.group = tile.shared ? groups.E : table[index / (area * split)];
    tile.first = groups.first(tile.group), tile.rows = groups.rows(tile.group);
    const int within = tile.shared ? index : index % (area * split);
    const int one = tile.shared ? shared_num_m * shared_num_n : area;
    tile.part = within / one;
    order_tiles(within % one, tile.shared ? shared_num_m : num_m, tile.shared ? shared_num_n : num_n, tile);
    return tile;
  }
};

// dweight_e (M, N) = sum over rows r of left_r^T right_r. One side has a row per token, which row_token finds.
template <class T_, Gathered GATHERED>
struct Dweight {
  using T = T_;
  using Tiles = WeightTiles;
  using Kept = Nothing;
  static constexpr int kHalves = 1, kRowsAlign = 64;
  static constexpr Summed kA = Summed::kOuter, kB = Summed::kOuter;
  static constexpr Gathered kGathered = GATHERED;
  static constexpr bool kColumnsFirst = true, kRowSum = false, kLongEpilogue = false;
  WeightTiles tiles;
  const T* left;  // (R or T, M)
  const T* shared_left;  // (T, Ms)
  const T* right;  // (R or T, N)
  const T* shared_right;
  const int32_t* row_token;  // null: both sides have a row per routed row
  T* out;  // (E, M, N)
  T* shared_out;  // (Ms, Ns)
  float* partials;  // (split, E, M, N), null where split is 1
  float* shared_partials;
  int M, Ms, N, Ns;

  __device__ int width(const Tile& tile) const { return tile.shared ? Ns : N; }
  __device__ void sum_range(Tile& tile) const {
    const int split = tile.shared ? tiles.shared_split : tiles.split;
    const int chunk = int(ceil_div(ceil_div(tile.rows, split), kRowsAlign)) * kRowsAlign;
    tile.k_begin = min(tile.part * chunk, tile.rows), tile.k_end = min(tile.k_begin + chunk, tile.rows);
  }
  __device__ Matrix<T> side(const Tile& tile, const T* routed, const T* shared, int cols, bool gathered) const {
    if (tile.shared) return {shared, cols, nullptr, tile.k_end, cols};
    if (gathered && row_token) return {routed, cols, row_token + tile.first, tile.k_end, cols};
    return {routed + int64_t(tile.first) * cols, cols, nullptr, tile.k_end, cols};
  }
  __device__ Matrix<T> a(const Tile& tile) const {
    return side(tile, left, shared_left, tile.shared ? Ms : M, GATHERED == Gathered::kA);
  }
  __device__ Matrix<T> b(const Tile& tile, int) const {
    return side(tile, right, shared_right, tile.shared ? Ns : N, GATHERED == Gathered::kB);
  }
  __device__ void enter(const Tile&, int, Matrix<T>&) const {}
  __device__ Kept kept(const Tile&, int, int) const { return {}; }
  template <class Store>
  __device__ float store(const Tile& tile, int row, int col, const float (&values)[8], const float (&)[8], const Kept&,
                         const Store& put) const {
    const int m = tile.shared ? Ms : M, n = tile.shared ? Ns : N;
    const int64_t at = int64_t(row) * n + col, matrix = int64_t(m) * n;
    float* part = tile.shared ? shared_partials : partials;
    if (part)
      put(part + (tile.shared ? tile.part : int64_t(tile.part) * tiles.groups.E + tile.group) * matrix + at, values);
    else
      put((tile.shared ? shared_out : out + tile.group * matrix) + at, values);
    return 0;
  }
  __device__ void finish_row(const Tile&, int, int, float) const {}
};

// Rows and columns of a tile that exist; a row beyond them is not stored.
template <class Product>
__device__ int result_rows(const Product& product, const Tile& tile) {
  if constexpr (Product::kA == Summed::kOuter)
    return tile.shared ? product.Ms : product.M;
  else
    return tile.rows;
}

}  // namespace moe::cuda
