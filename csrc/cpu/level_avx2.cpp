#define MOE_LEVEL level_avx2
#define MOE_W 8
#define MOE_MR 6
#define MOE_BF16_PAIRS 0
#include "kernels_impl.h"

namespace moe {
Kernels table_avx2() { return level_avx2::make_table("avx2"); }
}  // namespace moe
