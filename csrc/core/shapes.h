// The sizes and the plan that every room of every device takes; all pointers are the caller's.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace moe {

enum class Activation : int { kSwiGLU = 0, kGELU = 1 };

struct GatingSizes {
  int64_t T, H, E, K;  // K = 0: probabilities only
  Dtype dtype;         // of x and dx; the weight is widened by the caller
  int threads;
};

// A gradient of probs: rows of E, `stride` apart, 0 where one row is every token's; null: none.
struct DProbs {
  const float* rows;
  int64_t stride;
};

// A RoutingPlan to be filled, in the order of its fields.
struct PlanOut {
  float* row_weight;           // (R,)
  int32_t* expert_counts;      // (E,)
  int32_t* expert_offsets;     // (E + 1,)
  int32_t* row_token;          // (R,)
  int32_t* row_pick;           // (R,)
  int32_t* token_row_offsets;  // (T + 1,)
  int32_t* token_rows;         // (R,)
};

// What the rooms behind dispatch read of a RoutingPlan; bounds are the caller's to check (bindings do, on a CPU).
struct PlanView {
  const float* row_weight;           // (R,)
  const int32_t* expert_offsets;     // (E + 1,)
  const int32_t* row_token;          // (R,)
  const int32_t* token_row_offsets;  // (T + 1,)
  const int32_t* token_rows;         // (R,)
};

struct MoeSizes {
  int64_t T, H, E, R, I, Is;  // Is = 0: no shared expert
  Dtype dtype;                // storage dtype of x, weights, gradients: fp32, bf16 or fp16
  Activation activation;
  int threads;
  bool tf32 = false;  // fp32 products on a GPU may use TF32

  int64_t halves() const { return activation == Activation::kSwiGLU ? 2 : 1; }
};

// Slices of one tensor, `step` elements apart; they may overlap.
struct Slices {
  const void* data;
  int64_t step, count;
};

// Weights of one kind on a GPU. Without an index slice e of `routed` is all of expert e, and `shared` is one slice.
// With one every matrix is a slice: of gate_0, up_0, gate_1, ... number i is slice index[i] of `routed`; those of the
// shared expert come last, out of `shared`.
struct Weights {
  Slices routed, shared;  // shared.data: null without a shared expert
  const int32_t* index;   // on the GPU, or null
};

struct ExpertWeights {
  Weights gate_up_proj;  // slices (halves * I, H); (I, H) with an index
  Weights down_proj;     // (H, I)
};

struct ExpertGrads {
  void* dgate_up_proj;
  void* ddown_proj;
  void* dshared_gate_up_proj;
  void* dshared_down_proj;
};

}  // namespace moe
