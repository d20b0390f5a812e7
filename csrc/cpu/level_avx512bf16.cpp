#define MOE_LEVEL level_avx512bf16
#define MOE_W 16
#define MOE_MR 14
#define MOE_BF16_PAIRS 1
#include "kernels_impl.h"

namespace moe {
Kernels table_avx512bf16() { return level_avx512bf16::make_table("avx512bf16"); }
}  // namespace moe
