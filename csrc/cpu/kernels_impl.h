// The kernels, once for all ISA levels. A level_*.cpp defines MOE_LEVEL (namespace), MOE_W (floats per vector),
// MOE_MR (rows of the register tile) and MOE_BF16_PAIRS, is compiled with that level's flags, and includes this.
#include "experts_impl.h"
#include "tokens_impl.h"

namespace moe {
namespace MOE_LEVEL {
namespace {

Kernels make_table(const char* name) {
  Kernels table{};
  table.name = name;
  table.vector_floats = W;
  table.has_bf16_pairs = MOE_BF16_PAIRS != 0;
#define MOE_FILL(C, i)                                                                            \
  table.gather[i] = gather<C>, table.pack_gate_up_proj[i] = pack_gate_up_proj<C>,                     \
  table.pack_down_proj[i] = pack_down_proj<C>, table.up[i] = up<C>, table.down[i] = down<C>, table.dact[i] = dact<C>, \
  table.dx[i] = dx<C>, table.ddown_proj[i] = ddown_proj<C>, table.dgate_up_proj[i] = dgate_up_proj<C>
  MOE_FILL(Float32, int(Compute::kFloat32));
  MOE_FILL(Widened, int(Compute::kBFloat16Widened));
#if MOE_BF16_PAIRS
  MOE_FILL(Pairs, int(Compute::kBFloat16Pairs));
  table.peak[1] = peak<Pairs>;
#else
  table.peak[1] = peak<Float32>;
#endif
#undef MOE_FILL
  table.peak[0] = peak<Float32>;
  table.combine[0][0] = combine<float, float>, table.combine[0][1] = combine<float, bf16>;
  table.combine[1][1] = combine<bf16, bf16>;
  table.logits[0] = logits<float>, table.logits[1] = logits<bf16>;
  table.softmax = softmax;
  table.logits_dx[0] = logits_dx<float>, table.logits_dx[1] = logits_dx<bf16>;
  table.logits_dweight[0] = logits_dweight<float>, table.logits_dweight[1] = logits_dweight<bf16>;
  return table;
}

}  // namespace
}  // namespace MOE_LEVEL
}  // namespace moe
