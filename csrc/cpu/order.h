// Scores as integers in the same order: 0 and -0 alike, NaN above infinity, as torch sorts them.
#pragma once
#include "../core/dtype.h"

namespace moe {

inline int32_t order_key(float score) {
  const int32_t bits = int32_t(bits_of(score + 0.f));
  return score == score ? bits ^ ((bits >> 31) & INT32_MAX) : INT32_MAX;
}

// The score of a key: NaN and 0 for those that share one.
inline float score_of(int32_t key) { return float_of(uint32_t(key ^ ((key >> 31) & INT32_MAX))); }

// The same order for unsigned digits.
inline uint32_t unsigned_key(float score) { return uint32_t(order_key(score)) ^ 0x80000000u; }
inline int32_t signed_key(uint32_t key) { return int32_t(key ^ 0x80000000u); }

}  // namespace moe
