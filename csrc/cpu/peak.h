#pragma once
#include "../core/dtype.h"

namespace moe {

// Multiply-accumulate rate of a register-only loop in the level's widest form: GFLOP/s summed over `threads` threads,
// each divided by its own CPU time so that other load on the machine does not show. bf16 without vdpbf16ps is fp32.
double peak_gflops(Dtype dtype, int threads, double seconds);

}  // namespace moe
