// The experts room of one ISA level: gather, the four row-by-panel products and the two weight gradients.
#pragma once
#include "pack.h"

namespace moe {
namespace MOE_LEVEL {
namespace {

template <class C>
inline const uint32_t* items_at(const void* base, int64_t elements) {
  return reinterpret_cast<const uint32_t*>(static_cast<const typename C::Elem*>(base) + elements);
}

// The weights that the next block of panels will pack, in up to two contiguous pieces: brought into L2 while this block
// multiplies, since packing straight from memory costs a quarter of the time at 64 rows per expert.
class Ahead {
 public:
  Ahead() = default;
  // Spread `pieces` pieces of `bytes` bytes over `calls` micro-kernel calls of `items` steps.
  Ahead(const void* first, const void* second, int64_t bytes, int64_t calls, int64_t items)
      : first_(static_cast<const char*>(first)), second_(static_cast<const char*>(second)), bytes_(bytes) {
    const int64_t steps = calls * items, total = second ? 2 * bytes : bytes;
    step_ = first && steps > 0 ? min64(64, (total + steps - 1) / steps) : 0;
    stride_ = step_ * items;
  }
  const char* next(const void* idle) {
    const int64_t at = offset_;
    offset_ += stride_;
    if (step_ == 0) return static_cast<const char*>(idle);
    return at < bytes_ || !second_ ? first_ + at : second_ + (at - bytes_);
  }
  int64_t step() const { return step_; }

 private:
  const char *first_ = nullptr, *second_ = nullptr;
  int64_t bytes_ = 0, step_ = 0, stride_ = 0, offset_ = 0;
};

// One chunk of K for all rows of a group: for each tile and panel, multiply, then finish(row, rows, panel, tile).
// Panel p is packed at packed + p * panel_items * NR.
template <class C, class Finish>
inline void rows_by_panels(const uint32_t* a, int64_t lda_items, int64_t rows, const uint32_t* packed,
                           int64_t panel_items, int64_t items, int64_t panels, Ahead& ahead, const Finish& finish) {
  alignas(64) float tile[MR * NR];
  const Tiles tiles(rows);
  for (int64_t i = 0; i < tiles.count; ++i) {
    const int64_t row = tiles.begin(i);
    const int count = int(tiles.begin(i + 1) - row);
    const Micro kernel = micro_for<C, false>(count);
    for (int64_t p = 0; p < panels; ++p) {
      kernel(a + row * lda_items, lda_items, packed + p * panel_items * NR, items, tile, ahead.next(tile),
             ahead.step());
      finish(row, count, p, tile);
    }
  }
}

// Panels per block so that a packed block and the next one's weights share L2.
template <class C>
inline int64_t block_panels(int64_t k) {
  const int64_t panels = kPanelBytes / 2 / (NR * 4 * ((k + C::kPair - 1) / C::kPair));
  return panels > 0 ? panels : 1;
}

template <class C>
void gather(const Group& g, const void* source, void* target, int64_t begin, int64_t end) {
  using Store = typename C::Store;
  using Elem = typename C::Elem;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = g.row_token ? g.row_token[row] : g.token_begin + row;
    const Store* from = static_cast<const Store*>(source) + token * g.H;
    Elem* to = static_cast<Elem*>(target) + row * g.ld_h;
    if constexpr (sizeof(Store) == sizeof(Elem))
      std::memcpy(to, from, size_t(g.H) * sizeof(Elem));
    else
      for (int64_t h = 0; h < g.H; h += W) store(to + h, load(from + h, g.H - h), g.H - h);
    for (int64_t h = g.H; h < g.ld_h; ++h) to[h] = Elem{};
  }
}

template <class C>
void up(const Group& g, int64_t panel_begin, int64_t panel_end, void* scratch) {
  using Store = typename C::Store;
  const bool glu = g.activation == Activation::kSwiGLU;
  const int64_t items = (g.H + C::kPair - 1) / C::kPair, step = glu ? W : NR, width = block_panels<C>(g.H);
  const Store* weight = static_cast<const Store*>(g.gate_up_proj);
  uint32_t* packed = static_cast<uint32_t*>(scratch);
  for (int64_t begin = panel_begin; begin < panel_end; begin += width) {
    const int64_t end = min64(panel_end, begin + width), later = min64(panel_end, end + width);
    for (int64_t p = begin; p < end; ++p)
      for (int v = 0; v < 2; ++v) {
        const int64_t column = p * step + (glu ? 0 : v * W), row = glu ? v * g.I + column : column;
        pack_transposed<C>(weight + row * g.H, g.H, g.H, g.I - column, packed + (p - begin) * items * NR + v * W);
      }
    const Store* following = end < panel_end ? weight + end * step * g.H : nullptr;
    Ahead ahead(following, glu && following ? following + g.I * g.H : nullptr,
                (later - end) * step * g.H * int64_t(sizeof(Store)), Tiles(g.rows).count * (end - begin), items);
    const auto finish = [&](int64_t row, int rows, int64_t p, const float* tile) {
      const int64_t column = (begin + p) * step, n = g.I - column;
      typename C::Elem* act = static_cast<typename C::Elem*>(g.act) + row * g.ld_i + column;
      Store* kept = g.gate_up ? static_cast<Store*>(g.gate_up) + row * g.halves() * g.I + column : nullptr;
      for (int r = 0; r < rows; ++r, act += g.ld_i) {
        const vf first = loadu<vf>(tile + r * NR), second = loadu<vf>(tile + r * NR + W);
        if (glu) {
          store(act, first * sigmoid(first) * second, W);
        } else {
          vf density;
          store(act, first * normal_cdf(first, density), W);
          store(act + W, second * normal_cdf(second, density), W);
        }
        if (!kept) continue;
        store(kept + r * g.halves() * g.I, first, n);
        store(kept + r * g.halves() * g.I + (glu ? g.I : W), second, glu ? n : n - W);
      }
    };
    rows_by_panels<C>(items_at<C>(g.x, 0), g.ld_h / C::kPair, g.rows, packed, items, items, end - begin, ahead, finish);
  }
}

// g.y (+)= A[:, k] B[k, :] for one chunk of k; the first chunk stores.
template <class C>
inline void accumulate_y(const Group& g, const uint32_t* a, int64_t lda_items, const uint32_t* packed,
                         int64_t panel_items, int64_t items, int64_t panel_begin, int64_t panels, bool first,
                         Ahead& ahead) {
  rows_by_panels<C>(a, lda_items, g.rows, packed, panel_items, items, panels, ahead,
                    [&](int64_t row, int rows, int64_t p, const float* tile) {
                      const int64_t column = (panel_begin + p) * NR, n = g.H - column;
                      float* y = g.y + row * g.H + column;
                      for (int r = 0; r < rows; ++r, y += g.H)
                        for (int v = 0; v < NR; v += W) {
                          const vf value = loadu<vf>(tile + r * NR + v);
                          store(y + v, first ? value : value + load(y + v, n - v), n - v);
                        }
                    });
}

template <class C>
void down(const Group& g, int64_t panel_begin, int64_t panel_end, void* scratch) {
  using Store = typename C::Store;
  constexpr int64_t kChunk = kChunkItems * C::kPair;
  const int64_t panel_items = (g.I + C::kPair - 1) / C::kPair, width = block_panels<C>(g.I);
  const int64_t chunks = (g.I + kChunk - 1) / kChunk;
  const Store* weight = static_cast<const Store*>(g.down_proj);
  uint32_t* packed = static_cast<uint32_t*>(scratch);
  for (int64_t begin = panel_begin; begin < panel_end; begin += width) {
    const int64_t end = min64(panel_end, begin + width), later = min64(g.H, (end + width) * NR);
    for (int64_t p = begin; p < end; ++p)
      for (int64_t c = p * NR, v = 0; v < 2; ++v, c += W)
        pack_transposed<C>(weight + c * g.I, g.I, g.I, g.H - c, packed + (p - begin) * panel_items * NR + v * W);
    Ahead ahead(end < panel_end ? weight + end * NR * g.I : nullptr, nullptr,
                (later - end * NR) * g.I * int64_t(sizeof(Store)), Tiles(g.rows).count * (end - begin) * chunks,
                panel_items / chunks);
    for (int64_t k = 0; k < g.I; k += kChunk)
      accumulate_y<C>(g, items_at<C>(g.act, k), g.ld_i / C::kPair, packed + k / C::kPair * NR, panel_items,
                      (min64(kChunk, g.I - k) + C::kPair - 1) / C::kPair, begin, end - begin, k == 0, ahead);
  }
}

template <class C>
void dx(const Group& g, int64_t panel_begin, int64_t panel_end, void* scratch) {
  using Store = typename C::Store;
  uint32_t* packed = static_cast<uint32_t*>(scratch);
  constexpr int64_t kChunk = kChunkItems * C::kPair;
  Ahead none;
  for (int64_t half = 0; half < g.halves(); ++half)
    for (int64_t k = 0; k < g.I; k += kChunk) {
      const int64_t valid = min64(kChunk, g.I - k), items = (valid + C::kPair - 1) / C::kPair;
      const Store* weight = static_cast<const Store*>(g.gate_up_proj) + (half * g.I + k) * g.H;
      for (int64_t p = panel_begin; p < panel_end; ++p)
        for (int64_t c = p * NR, v = 0; v < 2; ++v, c += W)
          pack_natural<C>(weight + c, g.H, valid, g.H - c, packed + (p - panel_begin) * items * NR + v * W);
      accumulate_y<C>(g, items_at<C>(g.dgate_up, half * g.ld_i + k), g.halves() * g.ld_i / C::kPair, packed, items,
                      items, panel_begin, panel_end - panel_begin, half == 0 && k == 0, none);
    }
}

// act = silu(gate) up: its value and the factors of dact in dgate and dup. Likewise gelu.
struct ActGrad {
  vf act, dgate, dup;
};
inline ActGrad swiglu_grad(vf gate, vf up) {
  const vf s = sigmoid(gate), silu = gate * s;
  return {silu * up, up * (s + silu * (1.f - s)), silu};
}
inline ActGrad gelu_grad(vf x) {
  vf density;
  const vf cdf = normal_cdf(x, density);
  return {x * cdf, cdf + x * density, vf{}};
}

template <class C>
void dact(const Group& g, int64_t panel_begin, int64_t panel_end, void* scratch) {
  using Store = typename C::Store;
  using Elem = typename C::Elem;
  const bool glu = g.activation == Activation::kSwiGLU;
  const int64_t items = (g.H + C::kPair - 1) / C::kPair, width = block_panels<C>(g.H), all = (g.I + NR - 1) / NR;
  uint32_t* packed = static_cast<uint32_t*>(scratch);
  Ahead none;
  for (int64_t begin = panel_begin; begin < panel_end; begin += width) {
    const int64_t end = min64(panel_end, begin + width);
    for (int64_t p = begin; p < end; ++p)
      for (int64_t c = p * NR, v = 0; v < 2; ++v, c += W)
        pack_natural<C>(static_cast<const Store*>(g.down_proj) + c, g.I, g.H, g.I - c,
                        packed + (p - begin) * items * NR + v * W);
    const auto finish = [&](int64_t row, int rows, int64_t p, const float* tile) {
      const int64_t column = (begin + p) * NR;
      for (int r = 0; r < rows; ++r) {
        const Store* kept = static_cast<const Store*>(g.gate_up) + (row + r) * g.halves() * g.I + column;
        Elem* weighted = static_cast<Elem*>(g.act) + (row + r) * g.ld_i + column;
        Elem* dgate_up = static_cast<Elem*>(g.dgate_up) + (row + r) * g.halves() * g.ld_i + column;
        const float weight = g.row_weight ? g.row_weight[row + r] : 1.f;
        vf product{};
        for (int v = 0; v < NR; v += W) {
          const int64_t n = g.I - column - v;
          const vf gradient = loadu<vf>(tile + r * NR + v), gate = load(kept + v, n);
          const ActGrad d = glu ? swiglu_grad(gate, load(kept + g.I + v, n)) : gelu_grad(gate);
          product += gradient * d.act;
          store(weighted + v, weight * d.act, W);
          store(dgate_up + v, weight * gradient * d.dgate, W);
          if (glu) store(dgate_up + g.ld_i + v, weight * gradient * d.dup, W);
        }
        if (g.drow_weight_parts) g.drow_weight_parts[(row + r) * all + begin + p] = sum(product);
      }
    };
    rows_by_panels<C>(items_at<C>(g.dout, 0), g.ld_h / C::kPair, g.rows, packed, items, items, end - begin, none, finish);
  }
}

// ---------------------------------------------------------------------------------------------- weight gradients
// out[f, c] = sum over rows of a(row, f) b(row, c), for one block; a, b compute buffers, out storage.
template <class C>
void rows_contraction(const typename C::Elem* a, int64_t lda, const typename C::Elem* b, int64_t ldb, int64_t rows,
                      int64_t features, int64_t columns, int64_t panels, typename C::Store* out, int64_t ldo,
                      void* scratch) {
  constexpr int64_t kChunk = kChunkItems * C::kPair;
  const Tiles tiles(features);
  float* sums = static_cast<float*>(scratch);
  uint32_t* packed_b = reinterpret_cast<uint32_t*>(sums + kFeatureTiles * MR * kGradPanels * NR);
  uint32_t* packed_a = packed_b + kGradPanels * NR * kChunkItems;
  alignas(64) float tile[MR * NR];
  if (rows == 0)
    for (int64_t f = 0; f < features; ++f) std::memset(out + f * ldo, 0, size_t(min64(columns, panels * NR)) * sizeof(*out));
  for (int64_t k = 0; k < rows; k += kChunk) {
    const int64_t valid = min64(kChunk, rows - k), items = (valid + C::kPair - 1) / C::kPair;
    const bool first = k == 0, last = k + kChunk >= rows;
    for (int64_t c = 0; c < panels * NR; c += W)
      pack_natural<C>(b + k * ldb + c, ldb, valid, columns - c, packed_b + c / NR * items * NR + c % NR);
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t feature = tiles.begin(i);
      const int count = int(tiles.begin(i + 1) - feature);
      const uint32_t* rows_a = items_at<C>(a, k * lda + feature);
      if constexpr (C::kPair == 2) {  // fp32 rows are read where they are: 14 floats of a row are contiguous
        pack_features<C>(a + k * lda + feature, lda, valid, count, packed_a);
        rows_a = packed_a;
      }
      const Micro kernel = micro_for<C, true>(count);
      for (int64_t p = 0; p < panels; ++p) {
        kernel(rows_a, C::kPair == 2 ? count : lda, packed_b + p * items * NR, items, tile,
               reinterpret_cast<const char*>(tile), 0);
        float* kept = sums + (i * kGradPanels + p) * MR * NR;
        for (int r = 0; r < count; ++r)
          for (int v = 0; v < NR; v += W) {
            vf value = loadu<vf>(tile + r * NR + v);
            if (!first) value += loadu<vf>(kept + r * NR + v);
            if (last)
              store(out + (feature + r) * ldo + p * NR + v, value, columns - p * NR - v);
            else
              storeu(kept + r * NR + v, value);
          }
      }
    }
  }
}

template <class C>
void ddown_proj(const Group& g, const GradBlock& block, void* scratch) {
  const int64_t column = block.panel_begin * NR;
  rows_contraction<C>(static_cast<const typename C::Elem*>(g.dout) + block.feature_begin, g.ld_h,
                      static_cast<const typename C::Elem*>(g.act) + column, g.ld_i, g.rows,
                      block.feature_end - block.feature_begin, g.I - column, block.panel_end - block.panel_begin,
                      static_cast<typename C::Store*>(g.ddown_proj) + block.feature_begin * g.I + column, g.I, scratch);
}

template <class C>
void dgate_up_proj(const Group& g, const GradBlock& block, void* scratch) {
  const int64_t column = block.panel_begin * NR, out_row = block.half * g.I + block.feature_begin;
  rows_contraction<C>(
      static_cast<const typename C::Elem*>(g.dgate_up) + block.half * g.ld_i + block.feature_begin,
      g.halves() * g.ld_i, static_cast<const typename C::Elem*>(g.x) + column, g.ld_h, g.rows,
      block.feature_end - block.feature_begin, g.H - column, block.panel_end - block.panel_begin,
      static_cast<typename C::Store*>(g.dgate_up_proj) + out_row * g.H + column, g.H, scratch);
}

}  // namespace
}  // namespace MOE_LEVEL
}  // namespace moe
