// The experts room on a GPU: grouped expert MLP over a routing plan and the fused layer around it, both directions.
#pragma once
#include "../core/shapes.h"
#include "combine.h"
#include "stream.h"

namespace moe::cuda {

// What multiplies: the best that device and dtype have, or what a test asks for.
enum class Engine { kSimt, kSm80, kSm90 };

struct Device {
  int capability, processors;  // 90 for sm_90
};
Device current_device();
Engine engine_for(const Device&, Dtype, bool tf32);
int asked_columns();  // of Hopper's tiles: what a test asks for, or 0

// y_rows (R, H): each routed row through its expert, unweighted. gate_up (R, halves I) is kept when not null.
// Widths are multiples of 8, pointers of 16 bytes.
int64_t experts_fwd_workspace_bytes(const MoeSizes&);
void experts_fwd(const MoeSizes&, const PlanView&, const ExpertWeights&, const void* x, void* y_rows, void* gate_up,
                 void* workspace, cudaStream_t);

// Gradients of experts_fwd from dy_rows (R, H): dx (T, H) and the weight gradients.
int64_t experts_bwd_workspace_bytes(const MoeSizes&);
void experts_bwd(const MoeSizes&, const PlanView&, const ExpertWeights&, const void* x, const void* dy_rows,
                 const void* gate_up, void* dx, const ExpertGrads&, void* workspace, cudaStream_t);

// The adaLN residual around the layer: out = residual + gate_b y; out of the residual's dtype, y of the layer's.
struct Residual {
  const void* residual;
  const void* gate;
  Dtype dtype, gate_dtype;
  int64_t B;
  void* y;
};

// out (T, H) = shared(x) + sum of row_weight expert(x), accumulated in fp32 and rounded once.
int64_t moe_mlp_fwd_workspace_bytes(const MoeSizes&);
void moe_mlp_fwd(const MoeSizes&, const PlanView&, const ExpertWeights&, const void* x, void* out, void* gate_up,
                 void* shared_gate_up, const Residual*, void* workspace, cudaStream_t);

// Gradients of moe_mlp_fwd: dx (T, H), drow_weight (R,), with row_pick (R,) in the order of the picks, and the weight
// gradients (exact zeros for experts without rows). gate_up and shared_gate_up, where null, are computed again.
int64_t moe_mlp_bwd_workspace_bytes(const MoeSizes&, bool recompute);
void moe_mlp_bwd(const MoeSizes&, const PlanView&, const ExpertWeights&, const void* x, const void* dout,
                 const void* gate_up, const void* shared_gate_up, void* dx, float* drow_weight, const int32_t* row_pick,
                 const ExpertGrads&, void* workspace, cudaStream_t);

}  // namespace moe::cuda
