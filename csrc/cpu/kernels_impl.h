// The kernels, once for all ISA levels. A level_*.cpp defines MOE_LEVEL (namespace), MOE_W (floats per vector),
// MOE_MR (rows of the register tile) and MOE_BF16_PAIRS, is compiled with that level's flags, and includes this.
//
// Every GEMM here is  tile (mr <= MOE_MR rows) x (panel of 2W columns), K in 32-bit items (a float, or two bf16):
// B is packed into panels [k][2W], A is read by broadcast, the accumulators stay in registers.
#include "kernels.h"
#include "simd.h"

namespace moe {
namespace MOE_LEVEL {
namespace {

constexpr int MR = MOE_MR;
constexpr int NR = 2 * W;
constexpr int64_t kRegisterItems = 256;
constexpr int64_t kFeatureTiles = (kGradFeatures + MR - 1) / MR;

struct Float32 {
  using Store = float;
  using Elem = float;  // of the compute buffers
  static constexpr int kPair = 1;
};
struct Widened {
  using Store = bf16;
  using Elem = float;
  static constexpr int kPair = 1;
};
struct Pairs {
  using Store = bf16;
  using Elem = bf16;
  static constexpr int kPair = 2;
};

// ---------------------------------------------------------------------------------------------- micro-kernel
template <class C>
inline void multiply_add(vf& acc, const uint32_t* a, vf b) {
#if MOE_BF16_PAIRS
  if constexpr (C::kPair == 2) {
    acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(int(*a)), (__m512bh)b);
    return;
  }
#endif
  float value;
  std::memcpy(&value, a, 4);
  acc += value * b;
}

// tile[r][0..2W) = sum over k of A(r, k) B(k, :). A(r, k) = a[r * lda + k], or a[k * rows + r] when kPacked.
// Registers are emptied into the tile every kRegisterItems: rounding errors then grow like those of a blocked sum.
template <class C, bool kPacked, int rows>
void micro(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t items, float* tile) {
  constexpr int kBases = kPacked ? 1 : (rows + 2) / 3;
  const uint32_t* base[kBases];
#pragma GCC unroll 8
  for (int g = 0; g < kBases; ++g) base[g] = a + 3 * g * lda;
  for (int64_t begin = 0; begin < items; begin += kRegisterItems) {
    vf acc[rows][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) acc[r][0] = acc[r][1] = vf{};
    const int64_t end = min64(items, begin + kRegisterItems);
    for (int64_t k = begin; k < end; ++k) {
      const vf b0 = loadu<vf>(b), b1 = loadu<vf>(b + W);
      __builtin_prefetch(b + 8 * NR);
      __builtin_prefetch(b + 8 * NR + W);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const uint32_t* item = kPacked ? base[0] + r : base[r / 3] + (r % 3) * lda;
        multiply_add<C>(acc[r][0], item, b0);
        multiply_add<C>(acc[r][1], item, b1);
      }
      b += NR;
#pragma GCC unroll 8
      for (int g = 0; g < kBases; ++g) base[g] += kPacked ? rows : 1;
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      float* out = tile + r * NR;
      storeu(out, begin ? loadu<vf>(out) + acc[r][0] : acc[r][0]);
      storeu(out + W, begin ? loadu<vf>(out + W) + acc[r][1] : acc[r][1]);
    }
  }
}

using Micro = void (*)(const uint32_t*, int64_t, const uint32_t*, int64_t, float*);

template <class C, bool kPacked, int rows = MR>
inline Micro micro_for(int count) {
  if constexpr (rows == 0)
    return nullptr;
  else
    return count == rows ? &micro<C, kPacked, rows> : micro_for<C, kPacked, rows - 1>(count);
}

// Rows cut into tiles of nearly equal height: at most two heights occur, none much shorter than MR.
struct Tiles {
  int64_t rows, count;
  explicit Tiles(int64_t r) : rows(r), count((r + MR - 1) / MR) {}
  int64_t begin(int64_t i) const { return rows * i / count; }
};

// ---------------------------------------------------------------------------------------------- packing of B
inline uint32_t bits(float v) {
  uint32_t out;
  std::memcpy(&out, &v, 4);
  return out;
}

// Two consecutive k of one column as one item.
inline vu zip(vh even, vh odd) { return __builtin_convertvector(even, vu) | (__builtin_convertvector(odd, vu) << 16); }

// W columns of a K-major source: item (k, c) from source[(k * pair + p) * ld + c]; n valid columns, k_valid valid k.
template <class C, class S>
inline void pack_natural(const S* source, int64_t ld, int64_t k_valid, int64_t n, uint32_t* out) {
  if constexpr (C::kPair == 1) {
    for (int64_t k = 0; k < k_valid; ++k) storeu(out + k * NR, load(source + k * ld, n));
  } else {
    for (int64_t k = 0; k < k_valid; k += 2) {
      const vh even = load_n<vh>(source + k * ld, n);
      const vh odd = k + 1 < k_valid ? load_n<vh>(source + (k + 1) * ld, n) : vh{};
      storeu(out + k / 2 * NR, zip(even, odd));
    }
  }
}

// W columns from W rows of a (columns, K) source: the transpose of pack_natural.
template <class C, class S>
inline void pack_transposed(const S* source, int64_t ld, int64_t k_valid, int64_t n, uint32_t* out) {
  const int64_t items = (k_valid + C::kPair - 1) / C::kPair;
  for (int64_t k = 0; k < items; k += W) {
    vu rows[W];
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) {
      const int64_t valid = r < n ? k_valid - k * C::kPair : 0;
      const S* row = source + r * ld + k * C::kPair;
      if constexpr (C::kPair == 1) {
        rows[r] = valid > 0 ? (vu)load(row, valid) : vu{};
      } else {
        rows[r] = vu{};
        if (valid > 0) std::memcpy(&rows[r], row, size_t(min64(valid, 2 * W)) * sizeof(S));
      }
    }
    transpose(rows);
    const int64_t left = min64(W, items - k);
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r)
      if (r < left) storeu(out + (k + r) * NR, rows[r]);
  }
}

// ---------------------------------------------------------------------------------------------- rows x panels
template <class C>
inline const uint32_t* items_at(const void* base, int64_t elements) {
  return reinterpret_cast<const uint32_t*>(static_cast<const typename C::Elem*>(base) + elements);
}

// One chunk of K for all rows of a group: for each tile and panel, multiply, then finish(row, rows, panel, tile).
template <class C, class Finish>
inline void rows_by_panels(const uint32_t* a, int64_t lda_items, int64_t rows, const uint32_t* packed, int64_t items,
                           int64_t panels, const Finish& finish) {
  alignas(64) float tile[MR * NR];
  const Tiles tiles(rows);
  for (int64_t i = 0; i < tiles.count; ++i) {
    const int64_t row = tiles.begin(i);
    const int count = int(tiles.begin(i + 1) - row);
    const Micro kernel = micro_for<C, false>(count);
    for (int64_t p = 0; p < panels; ++p) {
      kernel(a + row * lda_items, lda_items, packed + p * items * NR, items, tile);
      finish(row, count, p, tile);
    }
  }
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
  const int64_t items = (g.H + C::kPair - 1) / C::kPair, step = glu ? W : NR;
  const Store* weight = static_cast<const Store*>(g.gate_up_proj);
  uint32_t* packed = static_cast<uint32_t*>(scratch);
  for (int64_t p = panel_begin; p < panel_end; ++p)
    for (int v = 0; v < 2; ++v) {
      const int64_t column = p * step + (glu ? 0 : v * W), row = glu ? v * g.I + column : column;
      pack_transposed<C>(weight + row * g.H, g.H, g.H, g.I - column, packed + (p - panel_begin) * items * NR + v * W);
    }
  const auto finish = [&](int64_t row, int rows, int64_t p, const float* tile) {
    const int64_t column = (panel_begin + p) * step, n = g.I - column;
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
  rows_by_panels<C>(items_at<C>(g.x, 0), g.ld_h / C::kPair, g.rows, packed, items, panel_end - panel_begin, finish);
}

// g.y (+)= A[:, k] B[k, :] for one chunk of k; the first chunk stores.
template <class C>
inline void accumulate_y(const Group& g, const uint32_t* a, int64_t lda_items, const uint32_t* packed, int64_t items,
                         int64_t panel_begin, int64_t panel_end, bool first) {
  rows_by_panels<C>(a, lda_items, g.rows, packed, items, panel_end - panel_begin,
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
  uint32_t* packed = static_cast<uint32_t*>(scratch);
  constexpr int64_t kChunk = kChunkItems * C::kPair;
  for (int64_t k = 0; k < g.I; k += kChunk) {
    const int64_t valid = min64(kChunk, g.I - k), items = (valid + C::kPair - 1) / C::kPair;
    for (int64_t p = panel_begin; p < panel_end; ++p)
      for (int64_t c = p * NR, v = 0; v < 2; ++v, c += W)
        pack_transposed<C>(static_cast<const Store*>(g.down_proj) + c * g.I + k, g.I, valid, g.H - c,
                           packed + (p - panel_begin) * items * NR + v * W);
    accumulate_y<C>(g, items_at<C>(g.act, k), g.ld_i / C::kPair, packed, items, panel_begin, panel_end, k == 0);
  }
}

template <class C>
void dx(const Group& g, int64_t panel_begin, int64_t panel_end, void* scratch) {
  using Store = typename C::Store;
  uint32_t* packed = static_cast<uint32_t*>(scratch);
  constexpr int64_t kChunk = kChunkItems * C::kPair;
  for (int64_t half = 0; half < g.halves(); ++half)
    for (int64_t k = 0; k < g.I; k += kChunk) {
      const int64_t valid = min64(kChunk, g.I - k), items = (valid + C::kPair - 1) / C::kPair;
      const Store* weight = static_cast<const Store*>(g.gate_up_proj) + (half * g.I + k) * g.H;
      for (int64_t p = panel_begin; p < panel_end; ++p)
        for (int64_t c = p * NR, v = 0; v < 2; ++v, c += W)
          pack_natural<C>(weight + c, g.H, valid, g.H - c, packed + (p - panel_begin) * items * NR + v * W);
      accumulate_y<C>(g, items_at<C>(g.dgate_up, half * g.ld_i + k), g.halves() * g.ld_i / C::kPair, packed, items,
                      panel_begin, panel_end, half == 0 && k == 0);
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
  const int64_t items = (g.H + C::kPair - 1) / C::kPair, all_panels = (g.I + NR - 1) / NR;
  uint32_t* packed = static_cast<uint32_t*>(scratch);
  for (int64_t p = panel_begin; p < panel_end; ++p)
    for (int64_t c = p * NR, v = 0; v < 2; ++v, c += W)
      pack_natural<C>(static_cast<const Store*>(g.down_proj) + c, g.I, g.H, g.I - c,
                      packed + (p - panel_begin) * items * NR + v * W);
  const auto finish = [&](int64_t row, int rows, int64_t p, const float* tile) {
    const int64_t column = (panel_begin + p) * NR;
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
      if (g.drow_weight_parts) g.drow_weight_parts[(row + r) * all_panels + panel_begin + p] = sum(product);
    }
  };
  rows_by_panels<C>(items_at<C>(g.dout, 0), g.ld_h / C::kPair, g.rows, packed, items, panel_end - panel_begin, finish);
}

// ---------------------------------------------------------------------------------------------- weight gradients
// A packed for a contraction over rows: [k item][tile rows] from element (row, feature) of a compute buffer.
template <class C>
inline void pack_features(const typename C::Elem* source, int64_t ld, int64_t k_valid, int count, uint32_t* out) {
  constexpr int kVectors = (MR + W - 1) / W;  // whole vectors are copied; what spills over is overwritten next
  for (int64_t k = 0; k < k_valid; k += C::kPair, source += C::kPair * ld, out += count)
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (C::kPair == 1)
        storeu(out + v * W, loadu<vf>(source + v * W));
      else
        storeu(out + v * W,
               zip(loadu<vh>(source + v * W), k + 1 < k_valid ? loadu<vh>(source + ld + v * W) : vh{}));
    }
}

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
      pack_features<C>(a + k * lda + feature, lda, valid, count, packed_a);
      const Micro kernel = micro_for<C, true>(count);
      for (int64_t p = 0; p < panels; ++p) {
        kernel(packed_a, 0, packed_b + p * items * NR, items, tile);
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

// ---------------------------------------------------------------------------------------------- combine, gating
template <class S>
void combine(const float* y, const float* row_weight, const int32_t* token_row_offsets, const int32_t* token_rows,
             const float* shared, void* out, int64_t H, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t)
    for (int64_t h = 0; h < H; h += W) {
      const int64_t n = H - h;
      vf value = shared ? load(shared + t * H + h, n) : vf{};
      for (int32_t i = token_row_offsets[t]; i < token_row_offsets[t + 1]; ++i) {
        const int64_t row = token_rows[i];
        const vf routed = load(y + row * H + h, n);
        value += row_weight ? row_weight[row] * routed : routed;
      }
      store(static_cast<S*>(out) + t * H + h, value, n);
    }
}

constexpr int kExpertBlock = 8;  // experts whose sums are held in registers together

template <class S>
void logits(const void* x, const float* weight, float* out, int64_t H, int64_t E, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t)
    for (int64_t e = 0; e < E; e += kExpertBlock) {
      const S* row = static_cast<const S*>(x) + t * H;
      const int count = int(min64(kExpertBlock, E - e));
      vf acc[kExpertBlock] = {};
      for (int64_t h = 0; h < H; h += W) {
        const vf value = load(row + h, H - h);
        for (int i = 0; i < count; ++i) acc[i] += value * load(weight + (e + i) * H + h, H - h);
      }
      for (int i = 0; i < count; ++i) out[t * E + e + i] = sum(acc[i]);
    }
}

template <class S>
void logits_dx(const float* dlogits, const float* weight, void* dx, int64_t H, int64_t E, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t)
    for (int64_t h = 0; h < H; h += W) {
      vf value{};
      for (int64_t e = 0; e < E; ++e) value += dlogits[t * E + e] * load(weight + e * H + h, H - h);
      store(static_cast<S*>(dx) + t * H + h, value, H - h);
    }
}

template <class S>
void logits_dweight(const float* dlogits, const void* x, float* dweight, int64_t T, int64_t H, int64_t E, int64_t begin,
                    int64_t end) {
  constexpr int64_t kBlock = 256;  // sums of sums: rounding grows with sqrt(256 + T/256), not sqrt(T)
  for (int64_t h = begin; h < end; h += W)
    for (int64_t e = 0; e < E; e += kExpertBlock) {
      const int count = int(min64(kExpertBlock, E - e));
      const int64_t n = min64(end - h, H - h);
      vf total[kExpertBlock] = {};
      for (int64_t t0 = 0; t0 < T; t0 += kBlock) {
        vf acc[kExpertBlock] = {};
        for (int64_t t = t0; t < min64(T, t0 + kBlock); ++t) {
          const vf value = load(static_cast<const S*>(x) + t * H + h, n);
          for (int i = 0; i < count; ++i) acc[i] += dlogits[t * E + e + i] * value;
        }
        for (int i = 0; i < count; ++i) total[i] += acc[i];
      }
      for (int i = 0; i < count; ++i) store(dweight + (e + i) * H + h, total[i], n);
    }
}

// ---------------------------------------------------------------------------------------------- peak
template <class C>
double peak(int64_t iterations) {
  alignas(64) uint32_t a[MR] = {};
  alignas(64) uint32_t b[NR] = {};
  vf acc[MR][2] = {};
  asm volatile("" : : "r"(a), "r"(b) : "memory");
  const vf b0 = loadu<vf>(b), b1 = loadu<vf>(b + W);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) asm volatile("" : "+x"(acc[r][0]), "+x"(acc[r][1]));  // not known to be equal
  for (int64_t k = 0; k < iterations; ++k) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      multiply_add<C>(acc[r][0], a, b0);
      multiply_add<C>(acc[r][1], a, b1);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) asm volatile("" : : "x"(acc[r][0]), "x"(acc[r][1]));
  return double(iterations) * MR * NR * C::kPair * 2;
}

Kernels make_table(const char* name) {
  Kernels table{};
  table.name = name;
  table.vector_floats = W;
  table.has_bf16_pairs = MOE_BF16_PAIRS != 0;
#define MOE_FILL(C, i)                                                                            \
  table.gather[i] = gather<C>, table.up[i] = up<C>, table.down[i] = down<C>, table.dact[i] = dact<C>, \
  table.dx[i] = dx<C>, table.ddown_proj[i] = ddown_proj<C>, table.dgate_up_proj[i] = dgate_up_proj<C>
  MOE_FILL(Float32, int(Compute::kFloat32));
  MOE_FILL(Widened, int(Compute::kBFloat16Widened));
#if MOE_BF16_PAIRS
  MOE_FILL(Pairs, int(Compute::kBFloat16Pairs));
  table.peak[1] = peak<Pairs>;
#else
  table.peak[1] = peak<Float32>;
#endif
#undef MOE_FILL
  table.peak[0] = peak<Float32>;
  table.combine[0] = combine<float>, table.combine[1] = combine<bf16>;
  table.logits[0] = logits<float>, table.logits[1] = logits<bf16>;
  table.logits_dx[0] = logits_dx<float>, table.logits_dx[1] = logits_dx<bf16>;
  table.logits_dweight[0] = logits_dweight<float>, table.logits_dweight[1] = logits_dweight<bf16>;
  return table;
}

}  // namespace
}  // namespace MOE_LEVEL
}  // namespace moe
