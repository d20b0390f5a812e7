// Combine, once for all ISA levels.
#pragma once
#include "micro.h"

namespace moe {
namespace MOE_LEVEL {
namespace {

template <class Y, class S>
void combine(const void* y, const float* row_weight, const int32_t* token_row_offsets, const int32_t* token_rows,
             const void* shared, void* out, int64_t H, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t)
    for (int64_t h = 0; h < H; h += W) {
      const int64_t n = H - h;
      vf value{};
      for (int32_t i = token_row_offsets[t]; i < token_row_offsets[t + 1]; ++i) {
        const int64_t row = token_rows[i];
        const vf routed = load(static_cast<const Y*>(y) + row * H + h, n);
        value += row_weight ? row_weight[row] * routed : routed;
      }
      // last: one rounding at its magnitude instead of one per row
      if (shared) value += load(static_cast<const Y*>(shared) + t * H + h, n);
      store(static_cast<S*>(out) + t * H + h, value, n);
    }
}

}  // namespace
}  // namespace MOE_LEVEL
}  // namespace moe
