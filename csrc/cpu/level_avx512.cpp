#define MOE_LEVEL level_avx512
#define MOE_W 16
#define MOE_MR 14
#define MOE_BF16_PAIRS 0
#include "kernels_impl.h"

namespace moe {
Kernels table_avx512() { return level_avx512::make_table("avx512"); }
}  // namespace moe
