// The register-only loop that bench calls the peak, once for all ISA levels.
#pragma once
#include "micro.h"

namespace moe {
namespace MOE_LEVEL {
namespace {

template <class C>
double peak(int64_t iterations) {
  alignas(64) uint32_t a[MR] = {};
  alignas(64) uint32_t b[NR] = {};
  vf acc[MR][2] = {};
  asm volatile("" : : "r"(a), "r"(b) : "memory");
  const vf b0 = loadu<vf>(b), b1 = loadu<vf>(b + W);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) asm volatile("" : "+x"(acc[r][0]), "+x"(acc[r][1]));  // not known to be equal
  for (int64_t k = 0; k < iterations; ++k) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      multiply_add<C>(acc[r][0], a, b0);
      multiply_add<C>(acc[r][1], a, b1);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) asm volatile("" : : "x"(acc[r][0]), "x"(acc[r][1]));
  return double(iterations) * MR * NR * C::kPair * 2;
}

}  // namespace
}  // namespace MOE_LEVEL
}  // namespace moe
