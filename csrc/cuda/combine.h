// The combine room on a GPU: rows back to tokens, a gather-sum in fixed order; the adaLN gate and residual around it.
#pragma once
#include "../core/shapes.h"
#include "stream.h"

namespace moe::cuda {

struct CombineArgs {
  int64_t T, H;
  Dtype dtype;                       // of rows, shared, out and y
  const void* rows;                  // (R, H)
  const float* row_weight;           // (R,), null: 1
  const int32_t* token_row_offsets;  // (T + 1,)
  const int32_t* token_rows;         // (R,)
  const void* shared;                // (T, H), null: none
  void* out;                         // (T, H); of residual_dtype with a residual
  // With a residual (T, H): out = residual + gate_b y with gate (B, H), and y (T, H) is kept.
  const void* residual;
  const void* gate;
  Dtype residual_dtype, gate_dtype;
  int64_t B;
  void* y;
  // With parts (R, num_parts): drow_weight[r] = their sum, in order; with row_pick (R,) at drow_weight[row_pick[r]].
  const float* parts;
  int64_t num_parts;
  float* drow_weight;
  const int32_t* row_pick;
};

// out[t] = sum over the token's rows, ascending, of row_weight * row, then + shared[t]; fp32, rounded once.
// A token without rows gets shared[t], or zeros.
void combine_fwd(const CombineArgs&, cudaStream_t);

// dy_rows[r] = row_weight[r] * dout[token]; drow_weight[r] = dout[token] . y_rows[r]. All of them of dtype.
void combine_bwd(int64_t R, int64_t H, Dtype dtype, const int32_t* row_token, const float* row_weight, const void* dout,
                 const void* y_rows, void* dy_rows, float* drow_weight, cudaStream_t);

// Backward of the gated residual: dy = gate_b dout (T, H) of y_dtype; dgate (B, H) = sums over an image's tokens of
// dout y, in order. dout of dtype, y of y_dtype, gate and dgate of gate_dtype.
int64_t gated_residual_bwd_workspace_bytes(int64_t B, int64_t T, int64_t H);
void gated_residual_bwd(int64_t B, int64_t T, int64_t H, Dtype dtype, Dtype y_dtype, Dtype gate_dtype, const void* dout,
                        const void* y, const void* gate, void* dy, void* dgate, void* workspace, cudaStream_t);

}  // namespace moe::cuda
