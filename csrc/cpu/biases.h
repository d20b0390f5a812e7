// Biases of experts on one ISA level: how sums begin with one, and its gradient.
#pragma once
#include "micro.h"

namespace moe {
namespace MOE_LEVEL {
namespace {

// Sums that products are added to: nothing, or, as every row of a tile, a bias.
struct FromZero {
  bool operator()(int64_t, int, float*) const { return false; }
};
inline void fill(float* to, int64_t ld, int rows, vf first, vf second) {
  for (int r = 0; r < rows; ++r, to += ld) storeu(to, first), storeu(to + W, second);
}

// In two steps, so that rounding errors grow with the square root of the rows' number.
template <class C>
void column_sums(const void* a, int64_t ld, int64_t rows, const float* weight, int64_t begin, int64_t end, float* out) {
  constexpr int64_t kTogether = 64;
  for (int64_t c = begin; c < end; c += W) {
    const auto* column = static_cast<const typename C::Elem*>(a) + c;
    vf total{};
    for (int64_t k = 0; k < rows; k += kTogether) {
      vf part{};
      for (int64_t row = k; row < min64(rows, k + kTogether); ++row)
        part += (weight ? weight[row] : 1.f) * load(column + row * ld, end - c);
      total += part;
    }
    store(out + c, total, end - c);
  }
}

}  // namespace
}  // namespace MOE_LEVEL
}  // namespace moe
