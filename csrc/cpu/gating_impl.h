// Gating: the router's products and its softmax, once for all ISA levels.
#pragma once
#include "micro.h"

namespace moe {
namespace MOE_LEVEL {
namespace {

// Tokens and experts whose sums are held in registers together.
constexpr int kTokenBlock = W == 16 ? 4 : 2;
constexpr int kExpertBlock = 4;

template <int tokens, int experts, class S>
inline void logits_block(const S* x, const float* weight, float* out, int64_t H, int64_t E) {
  vf acc[tokens][experts] = {};
  for (int64_t h = 0; h < H; h += W) {
    vf columns[experts];
#pragma GCC unroll 4
    for (int e = 0; e < experts; ++e) columns[e] = load(weight + e * H + h, H - h);
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) {
      const vf value = load(x + t * H + h, H - h);
#pragma GCC unroll 4
      for (int e = 0; e < experts; ++e) acc[t][e] += value * columns[e];
    }
  }
  for (int t = 0; t < tokens; ++t)
    for (int e = 0; e < experts; ++e) out[t * E + e] = sum(acc[t][e]);
}

template <int tokens, class S>
inline void logits_rows(const S* x, const float* weight, float* out, int64_t H, int64_t E) {
  int64_t e = 0;
  for (; e + kExpertBlock <= E; e += kExpertBlock) logits_block<tokens, kExpertBlock>(x, weight + e * H, out + e, H, E);
  for (; e < E; ++e) logits_block<tokens, 1>(x, weight + e * H, out + e, H, E);
}

template <class S>
void logits(const void* x, const float* weight, float* out, int64_t H, int64_t E, int64_t begin, int64_t end) {
  const S* rows = static_cast<const S*>(x);
  int64_t t = begin;
  for (; t + kTokenBlock <= end; t += kTokenBlock) logits_rows<kTokenBlock>(rows + t * H, weight, out + t * E, H, E);
  for (; t < end; ++t) logits_rows<1>(rows + t * H, weight, out + t * E, H, E);
}

bool softmax(float* row, int64_t E) {
  float most = row[0], not_finite = 0;
  for (int64_t e = 0; e < E; ++e) {
    most = row[e] > most ? row[e] : most;
    not_finite += row[e] * 0.f;  // NaN for a NaN and for an infinity
  }
  if (not_finite != 0.f) return false;
  vf total{};
  for (int64_t e = 0; e < E; e += W) {
    const vf value = vexp<true>(load(row + e, E - e) - most);
    store(row + e, value, E - e);
    total += load(row + e, E - e);
  }
  const float whole = sum(total);
  for (int64_t e = 0; e < E; e += W) store(row + e, load(row + e, E - e) / whole, E - e);
  return true;
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

// n <= W columns at h of `experts` rows of dweight, summed over all tokens.
template <int experts, class S>
inline void logits_dweight_block(const float* dlogits, const S* x, float* dweight, int64_t T, int64_t H, int64_t E,
                                 int64_t n) {
  constexpr int64_t kBlock = 256;  // sums of sums: rounding grows with sqrt(256 + T/256), not sqrt(T)
  vf total[experts] = {};
  for (int64_t begin = 0; begin < T; begin += kBlock) {
    vf acc[experts] = {};
    for (int64_t t = begin; t < min64(T, begin + kBlock); ++t) {
      const vf value = load(x + t * H, n);
#pragma GCC unroll 4
      for (int e = 0; e < experts; ++e) acc[e] += dlogits[t * E + e] * value;
    }
    for (int e = 0; e < experts; ++e) total[e] += acc[e];
  }
  for (int e = 0; e < experts; ++e) store(dweight + e * H, total[e], n);
}

template <class S>
void logits_dweight(const float* dlogits, const void* x, float* dweight, int64_t T, int64_t H, int64_t E, int64_t begin,
                    int64_t end) {
  for (int64_t h = begin; h < end; h += W) {
    const S* column = static_cast<const S*>(x) + h;
    const int64_t n = min64(end - h, H - h);
    int64_t e = 0;
    for (; e + kExpertBlock <= E; e += kExpertBlock)
      logits_dweight_block<kExpertBlock>(dlogits + e, column, dweight + e * H + h, T, H, E, n);
    for (; e < E; ++e) logits_dweight_block<1>(dlogits + e, column, dweight + e * H + h, T, H, E, n);
  }
}

}  // namespace
}  // namespace MOE_LEVEL
}  // namespace moe
