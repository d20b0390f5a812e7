// The activation of an expert and its derivative, in fp32.
#pragma once
#include "device.h"

namespace moe::cuda {

// silu(gate) up, or the exact gelu(gate).
template <bool GELU>
__device__ inline float activation(float gate, float up) {
  if (GELU) return 0.5f * gate * (1.0f + erff(gate * 0.7071067811865476f));
  return gate / (1.0f + expf(-gate)) * up;
}

struct ActivationGradient {
  float act, dgate, dup;  // for gelu dup is not used
};

template <bool GELU>
__device__ inline ActivationGradient activation_bwd(float dact, float gate, float up) {
  if (GELU) {
    const float cdf = 0.5f * (1.0f + erff(gate * 0.7071067811865476f));
    const float density = 0.3989422804014327f * expf(-0.5f * gate * gate);
    return {gate * cdf, dact * (cdf + gate * density), 0.0f};
  }
  const float sigmoid = 1.0f / (1.0f + expf(-gate)), silu = gate * sigmoid;
  return {silu * up, dact * up * sigmoid * (1.0f + gate * (1.0f - sigmoid)), dact * silu};
}

}  // namespace moe::cuda
