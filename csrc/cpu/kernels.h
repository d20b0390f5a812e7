// The dispatch table between the rooms (portable C++) and the kernels (one translation unit per ISA level).
#pragma once
#include <cstdint>

#include "../core/shapes.h"
#include "blocking.h"

namespace moe {

// How a storage dtype is multiplied: 16-bit ones are widened to fp32 while packing, or bf16 fed to vdpbf16ps in pairs.
enum class Compute : int { kFloat32 = 0, kBFloat16Widened = 1, kFloat16Widened = 2, kBFloat16Pairs = 3 };
constexpr int kComputes = 4;

// An Activation in its plain form, SiLU(gate) up or the exact GELU, or in its other one: with g = min(gate, limit) and
// u = clamp(up, -limit, limit), g sigmoid(alpha g) (u + shift); GELU's tanh form.
struct Variant {
  bool plain = true;
  float limit = 0, alpha = 0, shift = 0;
};

// One weight matrix, nn.Linear's (out, in), or its gradient, in its owner's memory: element (o, i) is
// data[o * ld + i], where transposed data[i * ld + o].
struct Matrix {
  void* data = nullptr;  // null: absent
  int64_t ld = 0;
  bool transposed = false;
};

// One expert (or the shared expert) with the rows routed to it. "storage" buffers have the user's dtype and no
// padding; "compute" buffers (workspace) have the compute dtype and padded leading dimensions ld_*.
struct Group {
  int64_t rows = 0, H = 0, I = 0;
  Activation activation = Activation::kSwiGLU;
  Variant variant;
  const int32_t* row_token = nullptr;   // (rows,), null: row r is token token_begin + r
  int64_t token_begin = 0;
  const float* row_weight = nullptr;    // (rows,), null: 1
  Matrix gate_proj, up_proj;            // (I, H) storage; gelu: up_proj only
  Matrix down_proj;                     // (H, I) storage
  const float* gate_up_bias = nullptr;  // (halves * I,) [gate | up]; null: none
  const float* down_bias = nullptr;     // (H,)
  const void* packed_gate_up_proj = nullptr;  // panels as pack_gate_up_proj makes them, null: packed in every call
  const void* packed_down_proj = nullptr;
  void* gate_up = nullptr;              // (rows, halves * I) storage, null: not kept
  void* x = nullptr;                    // (rows, ld_h) compute
  void* dout = nullptr;                 // (rows, ld_h) compute
  void* act = nullptr;                  // (rows, ld_i) compute; in backward row_weight * act
  void* dgate_up = nullptr;             // (rows, halves * ld_i) compute, each half starts at a multiple of ld_i
  float* y = nullptr;                   // (rows, H); in backward the gradient of the gathered x
  float* drow_weight_parts = nullptr;   // (rows, panels of I)
  Matrix dgate_proj, dup_proj, ddown_proj;  // storage, absent: not wanted
  float* dgate_up_bias = nullptr;       // (halves * I,), null: not wanted
  float* ddown_bias = nullptr;          // (H,)
  int64_t ld_h = 0, ld_i = 0;

  int64_t halves() const { return activation == Activation::kSwiGLU ? 2 : 1; }
  // What makes half 0 or 1 of gate_up, and its gradient.
  const Matrix& half_proj(int64_t half) const { return half + 1 < halves() ? gate_proj : up_proj; }
  const Matrix& dhalf_proj(int64_t half) const { return half + 1 < halves() ? dgate_proj : dup_proj; }
};

// A rectangle of a weight gradient as it is stored: rows [feature_begin, feature_end) x column panels.
struct GradBlock {
  int64_t half;                          // 0 or 1: which half of gate_up; ignored for down_proj
  int64_t feature_begin, feature_end, panel_begin, panel_end;
};

struct Kernels {
  const char* name;
  int vector_floats;                     // W; a panel of B is 2W columns wide
  bool has_bf16_pairs;

  // Rows [begin, end) of source (storage, row-major, H wide) gathered by the group's row_token into compute form.
  void (*gather[kComputes])(const Group&, const void* source, void* target, int64_t begin, int64_t end);
  // Panels [begin, end) of the weights as `up` and `down` read them; a panel is H (I) items of 2W, in 32-bit items.
  void (*pack_gate_up_proj[kComputes])(const Group&, int64_t panel_begin, int64_t panel_end, void* out);
  void (*pack_down_proj[kComputes])(const Group&, int64_t panel_begin, int64_t panel_end, void* out);
  // gate_up = x [gate_proj; up_proj]^T + gate_up_bias; act = activation(gate_up). Panels of 2W columns, with
  // a gate of W gate + W up.
  void (*up[kComputes])(const Group&, int64_t panel_begin, int64_t panel_end, void* scratch);
  // y = act down_proj^T + down_bias. Panels of H.
  void (*down[kComputes])(const Group&, int64_t panel_begin, int64_t panel_end, void* scratch);
  // dact' = dout down_proj; dgate_up, row_weight * act, and the parts of drow_weight. Panels of I.
  void (*dact[kComputes])(const Group&, int64_t panel_begin, int64_t panel_end, void* scratch);
  // y = dgate_up [gate_proj; up_proj]. Panels of H.
  void (*dx[kComputes])(const Group&, int64_t panel_begin, int64_t panel_end, void* scratch);
  // ddown_proj = dout^T act; dgate_proj or dup_proj = a half of dgate_up^T x. Stored
  // transposed: act^T dout, x^T dgate_up.
  void (*ddown_proj[kComputes])(const Group&, const GradBlock&, void* scratch);
  void (*dgate_up_proj[kComputes])(const Group&, const GradBlock&, void* scratch);

  // out[c] = sum over the rows r of weight[r] a[r * ld + c], weight null: 1; a in compute form. A bias's gradient.
  void (*column_sums[kComputes])(const void* a, int64_t ld, int64_t rows, const float* weight, int64_t begin,
                                 int64_t end, float* out);

  // out[t] = sum over the token's rows, ascending, of row_weight * y, then + shared[t]; fp32; out in storage dtype.
  // [dtype of y and shared][dtype of out]; fp32, or one dtype for both.
  void (*combine[kFloatDtypes][kFloatDtypes])(const void* y, const float* row_weight, const int32_t* token_row_offsets,
                                              const int32_t* token_rows, const void* shared, void* out, int64_t H,
                                              int64_t begin, int64_t end);
  // logits[t, e] = x[t] . weight[e], weight widened to fp32.
  void (*logits[kFloatDtypes])(const void* x, const float* weight, float* logits, int64_t H, int64_t E, int64_t begin,
                               int64_t end);
  // One row of logits to probabilities in place; false, and the row spoilt, where one is not finite.
  bool (*softmax)(float* row, int64_t E);
  // dx[t] = dlogits[t] weight; columns [begin, end) of dweight = dlogits^T x over all T tokens.
  void (*logits_dx[kFloatDtypes])(const float* dlogits, const float* weight, void* dx, int64_t H, int64_t E,
                                  int64_t begin, int64_t end);
  void (*logits_dweight[kFloatDtypes])(const float* dlogits, const void* x, float* dweight, int64_t T, int64_t H,
                                       int64_t E, int64_t begin, int64_t end);
  // Multiply-accumulate in registers only, for the peak: returns FLOPs done.
  double (*peak[kFloatDtypes])(int64_t iterations);
};

// Bytes of scratch one thread needs for any kernel above on a group of these sizes.
int64_t scratch_bytes(int64_t H, int64_t I);

// K steps (32-bit items) accumulated in registers before they are added to memory: keeps the packed panel in L2 and
// rounding errors growing with the square root of this instead of K.
constexpr int64_t kChunkItems = 512;
constexpr int64_t kGradFeatures = 384;      // features of a weight-gradient block over more than one chunk of rows

constexpr int64_t kPassPanels = 4;          // packed at once, at least, of a weight whose columns lie side by side

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Panels of `items` k steps that one task packs: blocking().panel_bytes of them, one at least.
inline int64_t panels_in_l2(int64_t items, int64_t panel_floats) {
  const int64_t panels = blocking().panel_bytes / (items * panel_floats * 4);
  return panels > 0 ? panels : 1;
}

// The best level this CPU runs, or the one MOE_KERNELS_ISA names (avx512bf16, avx512, avx2, portable).
const Kernels& kernels();

}  // namespace moe
