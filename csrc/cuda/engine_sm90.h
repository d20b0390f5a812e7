// Grouped products on Hopper, bf16 or fp16: a persistent block of one loading warpgroup and two that multiply (wgmma).
//
// Weights and packed rows come by TMA; rows that a token index finds come by cp.async, by all threads of the loading
// warpgroup. 128 x 128 tiles are multiplied in turns, one warpgroup stores while the other multiplies ("ping-pong");
// 128 x 192 and 128 x 256 tiles are shared, 64 rows each ("cooperative"). No tile waits for another block, nothing
// waits for the host.
#pragma once
#include <algorithm>

#include "engine.h"
#include "engines.h"
#include "hopper.h"

namespace moe::cuda::sm90 {

using namespace hopper;

constexpr int kM = 128, kK = 64, kGroup = 128, kThreads = 3 * kGroup;
constexpr int kSlab = 64 * kLine;  // 64 lines: a box of an operand that lies kOuter, or 64 rows of one kInner
constexpr int kSharedBytes = 227 * 1024;  // what a block may use on sm_90
constexpr int kTurn = 0, kCleared = 2;  // named barriers, one for each multiplying warpgroup

template <class Product, int N>
struct Config {
  static constexpr bool kPingPong = N == 128;
  static constexpr int kBlocks = kPingPong ? 2 : 1;  // of 64 rows, in one warpgroup
  static constexpr int kABytes = kM * kLine, kBBytes = N * kLine, kStageBytes = kABytes + kBBytes;
  static constexpr int kStages = N == 128 ? 6 : N == 192 ? 5 : 4;
  static constexpr bool kGathers = Product::kGathered != Gathered::kNone;
  static constexpr int kBoxBytes =
      (Product::kGathered == Gathered::kA ? 0 : kABytes) + (Product::kGathered == Gathered::kB ? 0 : kBBytes);
  static constexpr int kLoaderRegisters = kGathers ? 72 : 40, kMathRegisters = kGathers ? 216 : 232;
  static constexpr int kOffsets = kStages * kStageBytes;  // barriers, then the table of tiles
  static constexpr int shared_bytes(int table) {
    return kOffsets + 2 * kStages * int(sizeof(Barrier)) + table * int(sizeof(int));
  }
};

// The tensors that come by TMA.
struct Maps {
  TensorMap a, shared_a, b, shared_b;
};

// Position in the ring of stages; a stage's barriers end one phase each time around.
template <int STAGES>
struct Ring {
  int stage = 0, phase = 0;
  __device__ void advance(int steps = 1) {
    const int next = stage + steps;
    stage = next % STAGES;
    phase ^= next / STAGES & 1;
  }
};

template <class Product, int N>
struct Shared {
  using C = Config<Product, N>;
  char* memory;
  __device__ char* a(int stage) const { return memory + stage * C::kStageBytes; }
  __device__ char* b(int stage) const { return a(stage) + C::kABytes; }
  __device__ Barrier& full(int stage) const { return reinterpret_cast<Barrier*>(memory + C::kOffsets)[stage]; }
  __device__ Barrier& empty(int stage) const { return (&full(C::kStages))[stage]; }
  __device__ int* table() const { return reinterpret_cast<int*>(&full(2 * C::kStages)); }
};

// Boxes of an operand: `outer` is the coordinate along the tile, `row` what is added to the coordinate of rows. Rows
// are a 2-D tensor; weights have the slice as the last dimension.
template <Summed LIES, int SIZE>
__device__ void load_boxes(const TensorMap& map, Barrier& barrier, char* shared, int k, int outer, int row, int slice) {
  if (LIES == Summed::kInner) {
    load_box(map, barrier, shared, k, row + outer, 0, slice);
  } else {
#pragma unroll
    for (int slab = 0; slab < SIZE / 64; ++slab)
      load_box(map, barrier, shared + slab * kSlab, outer + slab * 64, row + k, 0, slice);
  }
}

// The slices that a tile's weights are in: one, or with an index one for each matrix of its expert.
struct TileSlices {
  int first, second;
};
template <class Product>
__device__ TileSlices slices_of(const Product& product, const Tile& tile) {
  if constexpr (Product::kA == Summed::kInner) {
    const int first = product.slice(tile, 0);
    return {first, product.from.index && product.matrices == 2 ? product.slice(tile, 1) : first};
  }
  return {};
}

// Boxes of weights. Two stacked halves are one box; with an index a box each, which lands where the one has its halves.
template <class Product, int N>
__device__ void load_weights(const Product& product, const Tile& tile, TileSlices slices, const TensorMap& map,
                             Barrier& barrier, char* shared, int k, int n) {
  const int split = product.split_of(tile);
  const bool second = split >= 0 && k >= split;
  load_boxes<Product::kB, N>(map, barrier, shared, second ? k - split : k, n, 0, second ? slices.second : slices.first);
  if (Product::kHalves == 2 && product.from.index)
    load_box(map, barrier, shared + N / 2 * kLine, k, n, 0, slices.second);
}

template <class Product, int N>
__device__ void load_tiles(const Product& product, const Maps& maps, const Shared<Product, N>& shared, int count) {
  using C = Config<Product, N>;
  using T = typename Product::T;
  constexpr bool kGatherA = Product::kGathered == Gathered::kA;
  const bool leads = threadIdx.x == 0;
  Ring<C::kStages> ring;
  for (int index = blockIdx.x; index < count; index += gridDim.x) {
    Tile tile = product.tiles.template locate<kM>(shared.table(), index);
    product.sum_range(tile);
    const int m = tile.m * kM, n = tile.n * (N / Product::kHalves);
    const TileSlices slices = slices_of(product, tile);
    const TensorMap& a = tile.shared ? maps.shared_a : maps.a;
    const TensorMap& b = tile.shared ? maps.shared_b : maps.b;
    using Gather = Loader<T, kGatherA ? Product::kA : Product::kB, kGatherA ? kM : N, kGroup>;
    Gather gather(kGatherA ? product.a(tile) : product.b(tile, 0), kGatherA ? m : n, tile.k_begin);
    const auto load_step = [&](int k, int step) {
      Barrier& full = shared.full(ring.stage);
      wait(shared.empty(ring.stage), ring.phase ^ 1);
      if (leads) {
        arrive_announcing(full, C::kBoxBytes);
        if (!kGatherA) load_boxes<Product::kA, kM>(a, full, shared.a(ring.stage), k, m, tile.first, 0);
        if constexpr (Product::kA == Summed::kInner)  // B is weights, not rows
          load_weights<Product, N>(product, tile, slices, b, full, shared.b(ring.stage), k, n);
        else if constexpr (Product::kGathered != Gathered::kB)
          load_boxes<Product::kB, N>(b, full, shared.b(ring.stage), k, n, tile.first, 0);
      }
      if constexpr (C::kGathers) {
        gather.load(kGatherA ? shared.a(ring.stage) : shared.b(ring.stage), k, step);
        arrive_after_chunks(full);
      }
      ring.advance();
    };
    for (int first = tile.k_begin; first < tile.k_end; first += Gather::kHeld * kK)
#pragma unroll
      for (int step = 0; step < Gather::kHeld; ++step)  // unrolled, or the rows looked up ahead would be waited for
        if (const int k = first + step * kK; k < tile.k_end) load_step(k, step);
  }
  let_successor_start();  // what is left to do is that the products and the stores of the last tiles end
  if constexpr (C::kGathers) wait_chunks<0>();  // a thread must not end before its copies
}

// Descriptor of step k (of 16) of an operand in swizzled lines.
template <Summed LIES>
__device__ uint64_t descriptor(const char* operand, int k) {
  constexpr uint64_t kStride = 8 * kLine >> 4, kLead = kSlab >> 4, kSwizzle128 = uint64_t(1) << 62;
  const uint64_t address = shared_address(operand) + (LIES == Summed::kInner ? k * 32 : k * 16 * kLine);
  return (address & 0x3FFFF) >> 4 | kLead << 16 | kStride << 32 | kSwizzle128;
}

// Zero what a step holds beyond the last row of its group: rows of the next group, which may be anything.
template <class Product, int N>
__device__ void clear_tail(const Shared<Product, N>& shared, int stage, int rows, int consumer) {
  constexpr bool kPingPong = Config<Product, N>::kPingPong;
  constexpr int kHelpers = kPingPong ? kGroup : 2 * kGroup;
  const int thread = kPingPong ? threadIdx.x % kGroup : threadIdx.x - kGroup, chunks = (kK - rows) * 8;
  for (int i = thread; i < (kM + N) / 64 * chunks; i += kHelpers) {
    char* line = shared.a(stage) + i / chunks * kSlab + (rows + i % chunks / 8) * kLine;
    *reinterpret_cast<Eight<bf16>*>(line + i % 8 * kChunk) = {};
  }
  make_visible();
  sync_threads(kCleared + (kPingPong ? consumer : 0), kHelpers);
}

// With `hand_over` the turn goes to the other warpgroup once all products of the tile are issued: it finds the tensor
// cores at work. All full barriers of the tile have been waited for by then, as its view of the ring
// demands.
template <class Product, int N>
__device__ void multiply_tile(const Tile& tile, const Shared<Product, N>& shared,
                              Ring<Config<Product, N>::kStages>& ring, int consumer, bool hand_over,
                              float (&sums)[Config<Product, N>::kBlocks][N / 2]) {
  using C = Config<Product, N>;
  int before = -1;  // the stage whose products may still be at work
  for (int k = tile.k_begin; k < tile.k_end; k += kK, ring.advance()) {
    wait(shared.full(ring.stage), ring.phase);
    if (C::kGathers) make_visible();
    if (Product::kA == Summed::kOuter && tile.k_end - k < kK) clear_tail(shared, ring.stage, tile.k_end - k, consumer);
    const char* a = shared.a(ring.stage) + (C::kPingPong ? 0 : consumer * kSlab);
#pragma unroll
    for (int block = 0; block < C::kBlocks; ++block) keep_order(sums[block]);
    start();
#pragma unroll
    for (int step = 0; step < kK / 16; ++step)
#pragma unroll
      for (int block = 0; block < C::kBlocks; ++block)
        multiply<typename Product::T, N, Product::kA, Product::kB>(sums[block],
                                                                   descriptor<Product::kA>(a + block * kSlab, step),
                                                                   descriptor<Product::kB>(shared.b(ring.stage), step));
    commit();
#pragma unroll
    for (int block = 0; block < C::kBlocks; ++block) keep_order(sums[block]);
    wait_products<1>();
    if (before >= 0 && threadIdx.x % kWarp == 0) arrive(shared.empty(before));
    before = ring.stage;
  }
  if (hand_over) arrive_threads(kTurn + 1 - consumer, 2 * kGroup);
  wait_products<0>();
#pragma unroll
  for (int block = 0; block < C::kBlocks; ++block) keep_order(sums[block]);
  if (before >= 0 && threadIdx.x % kWarp == 0) arrive(shared.empty(before));
}

// Cooperative: both warpgroups multiply every tile, 64 rows each. Ping-pong: each takes every other tile of the block,
// and stores it while the other multiplies; the turn is a named barrier for each, and the ring's phases go on over
// tiles that the other takes:
//   consumer 0   multiply tile 0 | store tile 0    | multiply tile 2 | store tile 2 ...
//   consumer 1   skip tile 0     | multiply tile 1 | store tile 1    | multiply tile 3 ...
//   turn         0, at the start | 1, by 0 when its products are issued | 0, by 1 | ...
template <class Product, int N>
__device__ void multiply_tiles(const Product& product, const Shared<Product, N>& shared, int count, int consumer) {
  using C = Config<Product, N>;
  Ring<C::kStages> ring;
  if (C::kPingPong && consumer == 1 && int(blockIdx.x) < count) arrive_threads(kTurn, 2 * kGroup);
  int turn = 0;
  for (int index = blockIdx.x; index < count; index += gridDim.x, turn ^= 1) {
    Tile tile = product.tiles.template locate<kM>(shared.table(), index);
    product.sum_range(tile);
    if (C::kPingPong && turn != consumer) {
      ring.advance(int(ceil_div(tile.k_end - tile.k_begin, kK)));
      continue;
    }
    if (C::kPingPong) sync_threads(kTurn + consumer, 2 * kGroup);
    float sums[C::kBlocks][N / 2] = {};
    multiply_tile<Product, N>(tile, shared, ring, consumer, C::kPingPong && index + int(gridDim.x) < count, sums);
    const int row = tile.m * kM + (C::kPingPong ? 0 : consumer * 64) + threadIdx.x % kGroup / kWarp * 16;
#pragma unroll
    for (int block = 0; block < C::kBlocks; ++block)
      store_accumulators<Product, N>(product, tile, row + block * 64, tile.n * (N / Product::kHalves), sums[block]);
  }
}

template <class Product, int N>
__global__ void __launch_bounds__(kThreads, 1) product_sm90(const Product product, const __grid_constant__ Maps maps) {
  using C = Config<Product, N>;
  MOE_DYNAMIC_SHARED(memory);
  const Shared<Product, N> shared{memory};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      init(shared.full(stage), 1 + (C::kGathers ? kGroup : 0));
      init(shared.empty(stage), (C::kPingPong ? 1 : 2) * kGroup / kWarp);
    }
    make_barriers_visible();
  }
  wait_for_predecessor();
  product.tiles.template prepare<kM>(shared.table());  // ends with a barrier of the block
  const int count = product.tiles.template count<kM>(shared.table()), group = threadIdx.x / kGroup;
  if (group == 0) {
    release_registers<C::kLoaderRegisters>();
    if (C::kGathers || threadIdx.x == 0) load_tiles<Product, N>(product, maps, shared, count);
  } else {
    acquire_registers<C::kMathRegisters>();
    multiply_tiles<Product, N>(product, shared, count, group - 1);
  }
}

// Rows (rows, cols), contiguous, as boxes of 64 columns. With no rows, no box is loaded.
template <class T>
TensorMap rows_map(const T* data, int64_t rows, int64_t cols, int box_rows) {
  if (rows == 0) return {};
  const int64_t strides[] = {1, cols, rows * cols, rows * cols};
  return tensor_map(dtype_of(T{}), data, {cols, rows, 1, 1}, strides, {64, box_rows, 1, 1});
}

// Slices of weights: (halves n, k), or (k, n) where they lie kOuter; with an index (n, k), or (k / matrices, n).
template <class Product, int N>
TensorMap weights_map(const Product& p, const Slices& of, int64_t n, int64_t k) {
  const Dtype dtype = dtype_of(typename Product::T{});
  const int halves = p.from.index ? 1 : Product::kHalves;
  if (Product::kB == Summed::kInner)
    return tensor_map(dtype, of.data, {k, n, halves, of.count}, {1, k, n * k, of.step},
                      {64, N / Product::kHalves, halves, 1});
  const int64_t rows = p.from.index ? k / p.matrices : k;
  return tensor_map(dtype, of.data, {n, rows, 1, of.count}, {1, n, n * rows, of.step}, {64, 64, 1, 1});
}

template <int N, class T, bool GELU, template <class, bool> class Kind>
Maps maps_of(const Kind<T, GELU>& p, int64_t) {  // Up and Dact: rows are gathered
  Maps maps{};
  if (p.N) maps.b = weights_map<Kind<T, GELU>, N>(p, p.from.routed, p.N, p.K);
  if (p.Ns) maps.shared_b = weights_map<Kind<T, GELU>, N>(p, p.from.shared, p.Ns, p.Ks);
  return maps;
}

template <int N, class T, Summed WEIGHTS>
Maps maps_of(const RowsTimes<T, WEIGHTS>& p, int64_t rows) {
  using Product = RowsTimes<T, WEIGHTS>;
  Maps maps{rows_map(p.rows, rows, p.K, kM), {}, weights_map<Product, N>(p, p.from.routed, p.N, p.K), {}};
  if (p.tiles.groups.T) {
    maps.shared_a = rows_map(p.shared_rows, p.tiles.groups.T, p.Ks, kM);
    maps.shared_b = weights_map<Product, N>(p, p.from.shared, p.Ns, p.Ks);
  }
  return maps;
}

template <int N, class T, Gathered GATHERED>
Maps maps_of(const Dweight<T, GATHERED>& p, int64_t rows) {
  Maps maps{};
  constexpr bool kBoxA = GATHERED == Gathered::kB;
  TensorMap &routed = kBoxA ? maps.a : maps.b, &shared = kBoxA ? maps.shared_a : maps.shared_b;
  routed = rows_map(kBoxA ? p.left : p.right, rows, kBoxA ? p.M : p.N, kK);
  if (p.tiles.groups.T)
    shared = rows_map(kBoxA ? p.shared_left : p.shared_right, p.tiles.groups.T, kBoxA ? p.Ms : p.Ns, kK);
  return maps;
}

template <class Product, int N>
void run_tiling(const Product& product, const Launch& on) {
  const int shared = Config<Product, N>::shared_bytes(Product::Tiles::table_size(product.tiles.groups.E));
  MOE_CHECK(shared <= kSharedBytes, "experts: ", product.tiles.groups.E, ", which need ", shared,
            " bytes of shared memory, expected at most ", kSharedBytes);
  if (on.tiles == 0) return;
  launch(product_sm90<Product, N>, dim3(unsigned(std::min(on.tiles, on.device.processors))), kThreads, size_t(shared),
         on.stream, product, maps_of<N>(product, on.rows));
}

template <class Product>
void run(const Product& product, const Launch& on) {
  if constexpr (!Product::kLongEpilogue) {
    if (on.tiling.n == kWide.n) return run_tiling<Product, kWide.n>(product, on);
    if (on.tiling.n == kMiddle.n) return run_tiling<Product, kMiddle.n>(product, on);
  }
  run_tiling<Product, kPingPong.n>(product, on);
}

}  // namespace moe::cuda::sm90
