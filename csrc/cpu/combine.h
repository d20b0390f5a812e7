// The combine room: y rows back to tokens, a gather-sum in fixed order.
#pragma once
#include <cstdint>

#include "../core/dtype.h"

namespace moe {

struct CombineArgs {
  int64_t T, H;
  Dtype y_dtype;  // of y and shared: fp32, or that of out
  Dtype dtype;    // of out
  int threads;
  const void* y;                     // (R, H)
  const float* row_weight;           // (R,), null: 1
  const int32_t* token_row_offsets;  // (T + 1,)
  const int32_t* token_rows;         // (R,)
  const void* shared;                // (T, H), null: none
  void* out;                         // (T, H)
};

// out[t] = sum over the token's rows, ascending, of row_weight * y, then + shared[t]; fp32, rounded once.
void combine_rows(const CombineArgs&);

// dy_rows[r] = row_weight[r] * dout[token]; drow_weight[r] = dout[token] . y_rows[r]. All of them of dtype.
void combine_bwd(int64_t R, int64_t H, Dtype dtype, int threads, const int32_t* row_token, const float* row_weight,
                 const void* dout, const void* y_rows, void* dy_rows, float* drow_weight);

// Round fp32 to dtype.
void round_rows(const float* source, void* out, int64_t count, Dtype dtype, int threads);

}  // namespace moe
