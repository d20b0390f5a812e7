#include "engine_simt.h"

namespace moe::cuda {

#define INSTANTIATE(...) template void simt::run(const __VA_ARGS__&, const Launch&);
MOE_PRODUCTS(INSTANTIATE, float)
MOE_PRODUCTS(INSTANTIATE, bf16)
MOE_PRODUCTS(INSTANTIATE, fp16)

}  // namespace moe::cuda
