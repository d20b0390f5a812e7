#define MOE_LEVEL level_portable
#define MOE_W 4
#define MOE_MR 6
#define MOE_BF16_PAIRS 0
#include "kernels_impl.h"

namespace moe {
Kernels table_portable() { return level_portable::make_table("portable"); }
}  // namespace moe
