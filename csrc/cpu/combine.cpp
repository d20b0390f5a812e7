#include "combine.h"

#include "../core/threads.h"
#include "kernels.h"

namespace moe {
namespace {

constexpr int64_t kTokenGrain = 64;

template <class S>
void combine_bwd_rows(int64_t H, const int32_t* row_token, const float* row_weight, const S* dout, const S* y_rows,
                      S* dy_rows, float* drow_weight, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const S* upstream = dout + row_token[r] * H;
    double product = 0;
    for (int64_t h = 0; h < H; ++h) {
      const float gradient = to_float(upstream[h]);
      product += double(gradient) * to_float(y_rows[r * H + h]);
      assign(dy_rows[r * H + h], row_weight[r] * gradient);
    }
    drow_weight[r] = float(product);
  }
}

}  // namespace

void combine_rows(const CombineArgs& a) {
  parallel_ranges(a.threads, a.T, kTokenGrain, [&](int64_t begin, int64_t end) {
    kernels().combine[int(a.y_dtype)][int(a.dtype)](a.y, a.row_weight, a.token_row_offsets, a.token_rows, a.shared,
                                                    a.out, a.H, begin, end);
  });
}

void combine_bwd(int64_t R, int64_t H, Dtype dtype, int threads, const int32_t* row_token, const float* row_weight,
                 const void* dout, const void* y_rows, void* dy_rows, float* drow_weight) {
  parallel_ranges(threads, R, kTokenGrain, [&](int64_t begin, int64_t end) {
    with_dtype(dtype, [&](auto element) {
      using S = decltype(element);
      combine_bwd_rows(H, row_token, row_weight, static_cast<const S*>(dout), static_cast<const S*>(y_rows),
                       static_cast<S*>(dy_rows), drow_weight, begin, end);
    });
  });
}

void round_rows(const float* source, void* out, int64_t count, Dtype dtype, int threads) {
  parallel_ranges(threads, count, 1 << 14, [&](int64_t begin, int64_t end) {
    with_dtype(dtype, [&](auto element) {
      for (int64_t i = begin; i < end; ++i) assign(static_cast<decltype(element)*>(out)[i], source[i]);
    });
  });
}

}  // namespace moe
