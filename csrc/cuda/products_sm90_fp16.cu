#include "engine_sm90.h"

namespace moe::cuda {

#define INSTANTIATE(...) template void sm90::run(const __VA_ARGS__&, const Launch&);
MOE_PRODUCTS(INSTANTIATE, fp16)

}  // namespace moe::cuda
