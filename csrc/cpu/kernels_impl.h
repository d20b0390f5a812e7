// The kernels, once for all ISA levels. A level_*.cpp defines MOE_LEVEL (namespace), MOE_W (floats per vector),
// MOE_MR (rows of the register tile) and MOE_BF16_PAIRS, is compiled with that level's flags, and includes this.
#include "combine_impl.h"
#include "experts_impl.h"
#include "gating_impl.h"
#include "peak_impl.h"
#include "weight_gradients_impl.h"

namespace moe {
namespace MOE_LEVEL {
namespace {

Kernels make_table(const char* name) {
  Kernels table{};
  table.name = name;
  table.vector_floats = W;
  table.has_bf16_pairs = MOE_BF16_PAIRS != 0;
#define MOE_FILL(C, i)                                                                                                \
  table.gather[i] = gather<C>, table.pack_gate_up_proj[i] = pack_gate_up_proj<C>,                                     \
  table.pack_down_proj[i] = pack_down_proj<C>, table.up[i] = up<C>, table.down[i] = down<C>, table.dact[i] = dact<C>, \
  table.dx[i] = dx<C>, table.ddown_proj[i] = ddown_proj<C>, table.dgate_up_proj[i] = dgate_up_proj<C>,                \
  table.column_sums[i] = column_sums<C>
  MOE_FILL(Float32, int(Compute::kFloat32));
  MOE_FILL(Widened<bf16>, int(Compute::kBFloat16Widened));
  MOE_FILL(Widened<fp16>, int(Compute::kFloat16Widened));
#if MOE_BF16_PAIRS
  MOE_FILL(Pairs, int(Compute::kBFloat16Pairs));
#endif
#undef MOE_FILL
  table.peak[int(Dtype::kFloat32)] = table.peak[int(Dtype::kFloat16)] = peak<Float32>;
  table.peak[int(Dtype::kBFloat16)] = peak<BFloat16>;
#define MOE_FILL(S, i)                                                                                       \
  table.combine[0][i] = combine<float, S>, table.combine[i][i] = combine<S, S>, table.logits[i] = logits<S>, \
  table.logits_dx[i] = logits_dx<S>, table.logits_dweight[i] = logits_dweight<S>
  MOE_FILL(float, int(Dtype::kFloat32));
  MOE_FILL(bf16, int(Dtype::kBFloat16));
  MOE_FILL(fp16, int(Dtype::kFloat16));
#undef MOE_FILL
  table.softmax = softmax;
  return table;
}

}  // namespace
}  // namespace MOE_LEVEL
}  // namespace moe
