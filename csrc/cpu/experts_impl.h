// The experts room of one ISA level: gather and the four row-by-panel products. weight_gradients_impl.h has the rest.
#pragma once
#include "biases.h"
#include "functions.h"
#include "pack.h"

namespace moe {
namespace MOE_LEVEL {
namespace {

// One chunk of K for all rows of a group: for each tile and panel, multiply, then finish(row, rows, panel, tile).
// start(panel, rows, tile) says whether it has put something into the tile that products are added to.
// prefetch(row, panel, streams) names what finish touches. Panel p is packed at packed + p * panel_items * NR.
template <class C, class Start, class Prefetch, class Finish>
inline void rows_by_panels(const uint32_t* a, int64_t lda_items, int64_t rows, const uint32_t* packed,
                           int64_t panel_items, int64_t items, int64_t panels, Ahead& ahead, const Start& start,
                           const Prefetch& prefetch, const Finish& finish) {
  alignas(64) float tile[MR * NR];
  const Tiles tiles(rows);
  for (int64_t i = 0; i < tiles.count; ++i) {
    const int64_t row = tiles.begin(i);
    const int count = int(tiles.begin(i + 1) - row);
    const Micro kernel = micro_for<C, false>(count);
    for (int64_t p = 0; p < panels; ++p) {
      Streams streams;
      prefetch(row, p, streams);
      ahead.share(streams);
      const bool add = start(p, count, tile);
      kernel(a + row * lda_items, lda_items, packed + p * panel_items * NR, items, tile, NR, add, streams);
      finish(row, count, p, tile);
    }
  }
}

// Panels per block so that a packed block and the next one's weights share L2.
template <class C>
inline int64_t block_panels(int64_t k) {
  return panels_in_l2(2 * items_of<C>(k), NR);
}

// Panels packed in one pass over a weight: a block, and at least kPassPanels where columns lie side by side. A pass
// reads that many columns of every k, whose rows of memory may lie a page apart: a single panel's are half a line.
template <class C>
inline int64_t pass_panels(int64_t k, bool k_major) {
  const int64_t width = block_panels<C>(k);
  return k_major ? width * ceil_div(kPassPanels, width) : width;
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
void pack_gate_up_proj(const Group& g, int64_t panel_begin, int64_t panel_end, void* out) {
  const int64_t items = items_of<C>(g.H);
  uint32_t* packed = static_cast<uint32_t*>(out);
  const Factor<C> gate = over_inputs<C>(g.gate_proj), up = over_inputs<C>(g.up_proj);
  if (g.activation == Activation::kGELU) {
    const int64_t column = panel_begin * NR;
    return pack_panels<C>(up.at(0, column), g.H, g.I - column, panel_end - panel_begin, items, packed,
                          g.rows <= kFewRows);
  }
  // Long rows of memory where columns lie side by side; else panel by panel, whose halves meet in L1.
  const int64_t run = gate.k_major && up.k_major ? panel_end - panel_begin : 1;
  for (int64_t p = panel_begin; p < panel_end; p += run, packed += run * items * NR) {
    pack_panels<C, W>(gate.at(0, p * W), g.H, g.I - p * W, run, items, packed, g.rows <= kFewRows);
    pack_panels<C, W>(up.at(0, p * W), g.H, g.I - p * W, run, items, packed + W, g.rows <= kFewRows);
  }
}

template <class C>
void pack_down_proj(const Group& g, int64_t panel_begin, int64_t panel_end, void* out) {
  const int64_t column = panel_begin * NR;
  pack_panels<C>(over_inputs<C>(g.down_proj).at(0, column), g.I, g.H - column, panel_end - panel_begin,
                 items_of<C>(g.I), static_cast<uint32_t*>(out), g.rows <= kFewRows);
}

// What packing `count` columns of gate_proj and up_proj from `column` on reads.
template <class C>
inline void gate_up_ahead(Ahead& ahead, const Group& g, int64_t column, int64_t count) {
  for (int64_t half = 0; half < g.halves(); ++half) {
    const Factor<C> weight = over_inputs<C>(g.half_proj(half)).at(0, column);
    if (!weight.k_major && weight.ld == g.H)
      ahead.contiguous(weight.data, count * g.H * int64_t(sizeof(typename C::Store)));
    else
      weight.ahead(ahead, g.H, count);
  }
}

template <class C, class Function>
inline void up_of(const Group& g, const Function& function, int64_t panel_begin, int64_t panel_end, void* scratch) {
  using Store = typename C::Store;
  constexpr bool glu = Function::kGated;
  const int64_t items = items_of<C>(g.H), step = glu ? W : NR, width = block_panels<C>(g.H);
  const int64_t pass = pass_panels<C>(g.H, over_inputs<C>(g.up_proj).k_major);
  const uint32_t* packed = static_cast<const uint32_t*>(g.packed_gate_up_proj);
  int64_t packed_begin = 0, packed_end = packed ? panel_end : panel_begin;  // which panels stand in `packed`
  for (int64_t begin = panel_begin; begin < panel_end; begin += width) {
    const int64_t end = min64(panel_end, begin + width), more = min64(panel_end, end + width) - end;
    if (begin == packed_end) {
      packed_begin = begin, packed_end = min64(panel_end, begin + pass);
      pack_gate_up_proj<C>(g, packed_begin, packed_end, scratch);
      packed = static_cast<const uint32_t*>(scratch);
    }
    Ahead ahead(Tiles(g.rows).count * (end - begin));
    if (end < packed_end)
      ahead.contiguous(packed + (end - packed_begin) * items * NR, more * items * NR * 4);
    else if (more > 0)
      gate_up_ahead<C>(ahead, g, end * step, min64(more * step, g.I - end * step));
    const auto start = [&](int64_t p, int rows, float* tile) {
      if (!g.gate_up_bias) return false;
      const int64_t column = (begin + p) * step, n = g.I - column;
      const float* bias = g.gate_up_bias + column;
      fill(tile, NR, rows, load(bias, n), glu ? load(bias + g.I, n) : load(bias + W, n - W));
      return true;
    };
    const auto prefetch = [&](int64_t row, int64_t p, Streams& streams) {
      const int64_t column = (begin + p) * step, act_width = step * int64_t(sizeof(typename C::Elem));
      streams.rows(static_cast<typename C::Elem*>(g.act) + row * g.ld_i + column, g.ld_i * sizeof(typename C::Elem),
                   act_width);
      for (int64_t half = 0; g.gate_up && half < g.halves(); ++half)
        streams.rows(static_cast<Store*>(g.gate_up) + (row * g.halves() + half) * g.I + column,
                     g.halves() * g.I * sizeof(Store), step * sizeof(Store));
    };
    const auto finish = [&](int64_t row, int rows, int64_t p, const float* tile) {
      const int64_t column = (begin + p) * step, n = g.I - column;
      typename C::Elem* act = static_cast<typename C::Elem*>(g.act) + row * g.ld_i + column;
      Store* kept = g.gate_up ? static_cast<Store*>(g.gate_up) + row * g.halves() * g.I + column : nullptr;
      for (int r = 0; r < rows; ++r, act += g.ld_i) {
        const vf first = loadu<vf>(tile + r * NR), second = loadu<vf>(tile + r * NR + W);
        if constexpr (glu) {
          store(act, function(first, second), W);
        } else {
          store(act, function(first), W);
          store(act + W, function(second), W);
        }
        if (!kept) continue;
        store(kept + r * g.halves() * g.I, first, n);
        store(kept + r * g.halves() * g.I + (glu ? g.I : W), second, glu ? n : n - W);
      }
    };
    rows_by_panels<C>(items_at<C>(g.x, 0), g.ld_h / C::kPair, g.rows, packed + (begin - packed_begin) * items * NR,
                      items, items, end - begin, ahead, start, prefetch, finish);
  }
}

template <class C>
void up(const Group& g, int64_t panel_begin, int64_t panel_end, void* scratch) {
  with_function(g, [&](const auto& function) { up_of<C>(g, function, panel_begin, panel_end, scratch); });
}

// g.y (+)= A[:, k] B[k, :] for one chunk of k; the first chunk stores, or adds to the bias.
template <class C>
inline void accumulate_y(const Group& g, const uint32_t* a, int64_t lda_items, const uint32_t* packed,
                         int64_t panel_items, int64_t items, int64_t panel_begin, int64_t panels, bool first,
                         const float* bias, Ahead& ahead) {
  const Tiles tiles(g.rows);
  alignas(64) float tile[MR * NR];
  for (int64_t i = 0; i < tiles.count; ++i) {
    const int64_t row = tiles.begin(i);
    const int rows = int(tiles.begin(i + 1) - row);
    const Micro kernel = micro_for<C, false>(rows);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t column = (panel_begin + p) * NR, n = g.H - column;
      float* y = g.y + row * g.H + column;
      const bool whole = n >= NR;
      Streams streams;
      streams.rows(y, g.H * 4, NR * 4);
      ahead.share(streams);
      const bool biased = first && bias;
      if (biased)
        fill(whole ? y : tile, whole ? g.H : NR, rows, load(bias + column, n), load(bias + column + W, n - W));
      kernel(a + row * lda_items, lda_items, packed + p * panel_items * NR, items, whole ? y : tile, whole ? g.H : NR,
             biased || (whole && !first), streams);
      for (int r = 0; !whole && r < rows; ++r)
        for (int64_t c = 0; c < n; ++c) y[r * g.H + c] = tile[r * NR + c] + (first ? 0.f : y[r * g.H + c]);
    }
  }
}

// One chunk of k of the panels [begin, end).
struct Round {
  int64_t k, count, begin, end;
};

template <class C>
void down(const Group& g, int64_t panel_begin, int64_t panel_end, void* scratch) {
  constexpr int64_t kChunk = kChunkItems * C::kPair;
  const Factor<C> weight = over_inputs<C>(g.down_proj);
  const int64_t width = panels_in_l2(2 * min64(kChunkItems, items_of<C>(g.I)), NR), whole = items_of<C>(g.I);
  const auto* all_packed = static_cast<const uint32_t*>(g.packed_down_proj);
  const auto round_at = [&](int64_t k, int64_t begin) {
    return Round{k, min64(kChunk, g.I - k), begin, min64(panel_end, begin + width)};
  };
  for (Round now = round_at(0, panel_begin); now.begin < panel_end;) {
    const int64_t items = items_of<C>(now.count), panels = now.end - now.begin;
    const bool last = now.k + now.count == g.I;
    const Round next = last ? round_at(0, now.end) : round_at(now.k + now.count, now.begin);
    Ahead ahead(Tiles(g.rows).count * panels);  // what the next round reads
    const uint32_t* packed = static_cast<const uint32_t*>(scratch);
    if (all_packed) {
      packed = all_packed + (now.begin * whole + now.k / C::kPair) * NR;
      for (int64_t p = next.begin; p < next.end; ++p)
        ahead.contiguous(all_packed + (p * whole + next.k / C::kPair) * NR, items_of<C>(next.count) * NR * 4);
    } else {
      pack_panels<C>(weight.at(now.k, now.begin * NR), now.count, g.H - now.begin * NR, panels, items,
                     static_cast<uint32_t*>(scratch), g.rows <= kFewRows);
      weight.at(next.k, next.begin * NR).ahead(ahead, next.count, min64(next.end * NR, g.H) - next.begin * NR);
    }
    accumulate_y<C>(g, items_at<C>(g.act, now.k), g.ld_i / C::kPair, packed, all_packed ? whole : items, items,
                    now.begin, panels, now.k == 0, g.down_bias, ahead);
    now = next;
  }
}

template <class C>
void dx(const Group& g, int64_t panel_begin, int64_t panel_end, void* scratch) {
  constexpr int64_t kChunk = kChunkItems * C::kPair;
  uint32_t* packed = static_cast<uint32_t*>(scratch);
  const int64_t column = panel_begin * NR, panels = panel_end - panel_begin, n = min64(g.H - column, panels * NR);
  for (int64_t half = 0; half < g.halves(); ++half)
    for (int64_t k = 0; k < g.I; k += kChunk) {
      const int64_t valid = min64(kChunk, g.I - k), items = items_of<C>(valid);
      pack_panels<C>(over_outputs<C>(g.half_proj(half)).at(k, column), valid, n, panels, items, packed);
      // The next chunk: of this matrix, or the first of the next.
      const bool last = k + valid == g.I;
      const int64_t next = last ? half + 1 : half, next_k = last ? 0 : k + valid;
      Ahead ahead(Tiles(g.rows).count * panels);
      if (next < g.halves())
        over_outputs<C>(g.half_proj(next)).at(next_k, column).ahead(ahead, min64(kChunk, g.I - next_k), n);
      accumulate_y<C>(g, items_at<C>(g.dgate_up, half * g.ld_i + k), g.halves() * g.ld_i / C::kPair, packed, items,
                      items, panel_begin, panels, half == 0 && k == 0, nullptr, ahead);
    }
}

template <class C, class Function>
inline void dact_of(const Group& g, const Function& function, int64_t panel_begin, int64_t panel_end, void* scratch) {
  using Store = typename C::Store;
  using Elem = typename C::Elem;
  constexpr bool glu = Function::kGated;
  const int64_t items = (g.H + C::kPair - 1) / C::kPair, width = block_panels<C>(g.H), all = (g.I + NR - 1) / NR;
  uint32_t* packed = static_cast<uint32_t*>(scratch);
  const Factor<C> weight = over_outputs<C>(g.down_proj);
  for (int64_t begin = panel_begin; begin < panel_end; begin += width) {
    const int64_t end = min64(panel_end, begin + width), more = min64(panel_end, end + width) - end;
    pack_panels<C>(weight.at(0, begin * NR), g.H, g.I - begin * NR, end - begin, items, packed);
    Ahead ahead(Tiles(g.rows).count * (end - begin));
    weight.at(0, end * NR).ahead(ahead, g.H, min64(more * NR, g.I - end * NR));
    const auto prefetch = [&](int64_t row, int64_t p, Streams& streams) {
      const int64_t column = (begin + p) * NR;
      streams.rows(static_cast<const Elem*>(g.act) + row * g.ld_i + column, g.ld_i * sizeof(Elem), NR * sizeof(Elem));
      for (int64_t half = 0; half < g.halves(); ++half) {
        streams.rows(static_cast<const Store*>(g.gate_up) + (row * g.halves() + half) * g.I + column,
                     g.halves() * g.I * sizeof(Store), NR * sizeof(Store));
        streams.rows(static_cast<const Elem*>(g.dgate_up) + (row * g.halves() + half) * g.ld_i + column,
                     g.halves() * g.ld_i * sizeof(Elem), NR * sizeof(Elem));
      }
    };
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
          ActGrad d;
          if constexpr (glu)
            d = function.grad(gate, load(kept + g.I + v, n));
          else
            d = function.grad(gate);
          product += gradient * d.act;
          store(weighted + v, weight * d.act, W);
          store(dgate_up + v, weight * gradient * d.dgate, W);
          if (glu) store(dgate_up + g.ld_i + v, weight * gradient * d.dup, W);
        }
        if (g.drow_weight_parts) g.drow_weight_parts[(row + r) * all + begin + p] = sum(product);
      }
    };
    rows_by_panels<C>(items_at<C>(g.dout, 0), g.ld_h / C::kPair, g.rows, packed, items, items, end - begin, ahead,
                      FromZero{}, prefetch, finish);
  }
}

template <class C>
void dact(const Group& g, int64_t panel_begin, int64_t panel_end, void* scratch) {
  with_function(g, [&](const auto& function) { dact_of<C>(g, function, panel_begin, panel_end, scratch); });
  if (panel_begin > 0 || !g.down_bias || !g.drow_weight_parts) return;
  const int64_t all = (g.I + NR - 1) / NR;
  for (int64_t row = 0; row < g.rows; ++row) {  // the bias's share of drow_weight, beside the first panel's
    const auto* dout = static_cast<const typename C::Elem*>(g.dout) + row * g.ld_h;
    vf product{};
    for (int64_t h = 0; h < g.H; h += W) product += load(dout + h, g.H - h) * load(g.down_bias + h, g.H - h);
    g.drow_weight_parts[row * all] += sum(product);
  }
}

}  // namespace
}  // namespace MOE_LEVEL
}  // namespace moe
