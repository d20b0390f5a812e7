#include "engine_sm80.h"

namespace moe::cuda {

#define INSTANTIATE(...) template void sm80::run(const __VA_ARGS__&, const Launch&);
MOE_PRODUCTS(INSTANTIATE, float)
MOE_PRODUCTS(INSTANTIATE, bf16)
MOE_PRODUCTS(INSTANTIATE, fp16)

}  // namespace moe::cuda
