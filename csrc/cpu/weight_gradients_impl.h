// The experts room of one ISA level: the two weight gradients, which sum over rows.
#pragma once
#include "pack.h"

namespace moe {
namespace MOE_LEVEL {
namespace {

// out[f, c] = sum over rows of a(row, f) b(row, c), for one block; a, b compute buffers, out storage.
// The sums of a tile over chunks of rows stand in `out` itself where it is fp32 and the panel whole; else in `tile`
// where one chunk has all rows, in scratch where there are several; the last chunk stores those, converted or cut.
template <class C>
void rows_contraction(const typename C::Elem* a, int64_t lda, const typename C::Elem* b, int64_t ldb, int64_t rows,
                      int64_t features, int64_t columns, int64_t panels, typename C::Store* out, int64_t ldo,
                      void* scratch) {
  constexpr int64_t kChunk = kChunkItems * C::kPair;
  constexpr bool kPacked = kTilesPacked<C> > 0;
  static_assert(kPacked || W > 8, "Rows::step knows that short tiles are packed");
  constexpr int64_t kTogether = kPacked ? kTilesPacked<C> : 1;
  constexpr bool kDirect = sizeof(typename C::Store) == 4;  // sums stand in `out` itself where its panel is whole
  const int64_t chunk_panels = panels_in_l2(kChunkItems, NR);
  const Tiles tiles(features);
  float* sums = static_cast<float*>(scratch);
  uint32_t* packed_b = reinterpret_cast<uint32_t*>(sums + kFeatureTiles * MR * chunk_panels * NR);
  uint32_t* packed_a = packed_b + blocking().panel_bytes / 4;
  alignas(64) float tile[MR * NR];
  if (rows == 0)
    for (int64_t f = 0; f < features; ++f)
      std::memset(out + f * ldo, 0, size_t(min64(columns, panels * NR)) * sizeof(*out));
  for (int64_t k = 0; k < rows; k += kChunk) {
    const int64_t valid = min64(kChunk, rows - k), items = items_of<C>(valid);
    const bool first = k == 0, last = k + kChunk >= rows;
    pack_natural<C>(b + k * ldb, ldb, valid, columns, panels, items, packed_b);
    Ahead ahead;
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t feature = tiles.begin(i), together = i % kTogether;
      const int count = int(tiles.begin(i + 1) - feature);
      if (together == 0) {
        const int64_t end = min64(i + kTogether, tiles.count), next = tiles.begin(end);
        if constexpr (kPacked) pack_features<C>(a + k * lda, lda, valid, tiles, i, end, packed_a);
        ahead = Ahead((end - i) * panels);  // a line per row: no hardware prefetcher sees that
        ahead.block(a + k * lda + next, lda * sizeof(*a), next < features ? valid : 0,
                    (tiles.begin(min64(end + kTogether, tiles.count)) - next) * sizeof(*a));
      }
      const uint32_t* rows_a = kPacked ? packed_a + together * kPackedTile : items_at<C>(a, k * lda + feature);
      const Micro kernel = micro_for<C, true>(count);
      for (int64_t p = 0; p < panels; ++p) {
        typename C::Store* to = out + feature * ldo + p * NR;
        const int64_t n = columns - p * NR;
        float* sum = first && last ? tile : sums + (i * chunk_panels + p) * MR * NR;
        int64_t ld = NR;
        if constexpr (kDirect)
          if (n >= NR) sum = to, ld = ldo;
        Streams streams;
        streams.rows(to, ldo * sizeof(*to), NR * sizeof(*to));
        ahead.share(streams);
        kernel(rows_a, kPacked ? count : lda, packed_b + p * items * NR, items, sum, ld, !first, streams);
        if (!last || (kDirect && n >= NR)) continue;
        for (int r = 0; r < count; ++r)
          for (int v = 0; v < NR; v += W) store(to + r * ldo + v, loadu<vf>(sum + r * NR + v), n - v);
      }
    }
  }
}

// Columns of a compute buffer: one side of a weight, over all rows of a group.
template <class C>
struct Side {
  const typename C::Elem* data;
  int64_t ld, width;
  Side(const void* buffer, int64_t offset, int64_t ld, int64_t width)
      : data(static_cast<const typename C::Elem*>(buffer) + offset), ld(ld), width(width) {}
};

// One block of a weight gradient (out, in), in the order in which it is stored: in the other the sides change places,
// and the same products are summed in the same sequence.
template <class C>
inline void weight_gradient(const Side<C>& out, const Side<C>& in, int64_t rows, const Matrix& to,
                            const GradBlock& block, void* scratch) {
  const Side<C>&a = to.transposed ? in : out, &b = to.transposed ? out : in;
  const int64_t column = block.panel_begin * NR;
  rows_contraction<C>(a.data + block.feature_begin, a.ld, b.data + column, b.ld, rows,
                      block.feature_end - block.feature_begin, b.width - column, block.panel_end - block.panel_begin,
                      static_cast<typename C::Store*>(to.data) + block.feature_begin * to.ld + column, to.ld, scratch);
}

template <class C>
void ddown_proj(const Group& g, const GradBlock& block, void* scratch) {
  weight_gradient<C>({g.dout, 0, g.ld_h, g.H}, {g.act, 0, g.ld_i, g.I}, g.rows, g.ddown_proj, block, scratch);
}

template <class C>
void dgate_up_proj(const Group& g, const GradBlock& block, void* scratch) {
  weight_gradient<C>({g.dgate_up, block.half * g.ld_i, g.halves() * g.ld_i, g.I}, {g.x, 0, g.ld_h, g.H}, g.rows,
                     g.dhalf_proj(block.half), block, scratch);
}

}  // namespace
}  // namespace MOE_LEVEL
}  // namespace moe
