// The activation of an expert and its derivative, in fp32; T is what it will be stored as.
#pragma once
#include "device.h"

namespace moe::cuda {

// Of what is rounded to 16 bits afterwards a few units in fp32's last place do not matter, but the slow paths of the
// exact division and exponential do: their branches stand between the elements, which then wait for each other.
template <class T>
constexpr bool kFast = sizeof(T) == 2;

// Results below the smallest normal number are zero: told apart they cost three instructions an element more.
__device__ inline float fast_exponential(float x) {
#ifdef MOE_FIBERS
  return std::exp2(x * 1.4426950408889634f);
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.4426950408889634f));
  return power;
#endif
}
template <class T>
__device__ inline float exponential(float x) {
  return kFast<T> ? fast_exponential(x) : expf(x);
}
template <class T>
__device__ inline float quotient(float a, float b) {
  return kFast<T> ? __fdividef(a, b) : a / b;
}

struct Normal {
  float cdf, density;
};

// The standard normal distribution at x. Fast: formula 26.2.17 of Abramowitz and Stegun, some 1e-7 off.
template <class T>
__device__ inline Normal normal(float x) {
  const float density = 0.3989422804014327f * exponential<T>(-0.5f * x * x);
  if (!kFast<T>) return {0.5f * (1.0f + erff(x * 0.7071067811865476f)), density};
  const float t = quotient<T>(1.0f, 1.0f + 0.2316419f * fabsf(x));
  const float tail =
      density * t * (0.319381530f + t * (-0.356563782f + t * (1.781477937f + t * (-1.821255978f + t * 1.330274429f))));
  return {x < 0 ? tail : 1.0f - tail, density};
}

// silu(gate) up, or the exact gelu(gate).
template <bool GELU, class T>
__device__ inline float activation(float gate, float up) {
  if (GELU) return gate * normal<T>(gate).cdf;
  return quotient<T>(gate, 1.0f + exponential<T>(-gate)) * up;
}

struct ActivationGradient {
  float act, dgate, dup;  // for gelu dup is not used
};

template <bool GELU, class T>
__device__ inline ActivationGradient activation_bwd(float dact, float gate, float up) {
  if (GELU) {
    const Normal at = normal<T>(gate);
    return {gate * at.cdf, dact * (at.cdf + gate * at.density), 0.0f};
  }
  const float sigmoid = quotient<T>(1.0f, 1.0f + exponential<T>(-gate)), silu = gate * sigmoid;
  return {silu * up, dact * up * sigmoid * (1.0f + gate * (1.0f - sigmoid)), dact * silu};
}

}  // namespace moe::cuda
