// What experts compute between their two products, on vectors of one ISA level.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace moe {
namespace MOE_LEVEL {
namespace {

// What an expert computes between its two products: its value, and that with the factors of dact in dgate and dup.
// Functions without a gate take one argument; dup is not theirs.
struct ActGrad {
  vf act, dgate, dup;
};

struct SwiGLU {
  static constexpr bool kGated = true;
  vf operator()(vf gate, vf up) const { return gate * sigmoid(gate) * up; }
  ActGrad grad(vf gate, vf up) const {
    const vf s = sigmoid(gate), silu = gate * s;
    return {silu * up, up * (s + silu * (1.f - s)), silu};
  }
};

struct ClampedSwiGLU {
  static constexpr bool kGated = true;
  float limit, alpha, shift;
  vf operator()(vf gate, vf up) const {
    const vf g = below(gate);
    return g * sigmoid(alpha * g) * (inside(up) + shift);
  }
  ActGrad grad(vf gate, vf up) const {
    const vf g = below(gate), u = inside(up) + shift, s = sigmoid(alpha * g), value = g * s;
    const vf dgate = u * (s + alpha * value * (1.f - s));
    return {value * u, gate > limit ? vf{} : dgate, (up > limit) | (up < -limit) ? vf{} : value};
  }

 private:
  vf below(vf x) const { return x > limit ? vf{} + limit : x; }  // a NaN stays one
  vf inside(vf x) const { return x < -limit ? vf{} - limit : below(x); }
};

struct GELU {
  static constexpr bool kGated = false;
  vf operator()(vf x) const {
    vf density;
    return x * normal_cdf(x, density);
  }
  ActGrad grad(vf x) const {
    vf density;
    const vf cdf = normal_cdf(x, density);
    return {x * cdf, cdf + x * density, vf{}};
  }
};

// x (1 + tanh(z)) / 2 = x sigmoid(2 z), z = sqrt(2/pi) (x + 0.044715 x^3).
struct GELUTanh {
  static constexpr bool kGated = false;
  static constexpr float kLinear = 1.595769122f, kCubic = 0.071354816f;
  vf operator()(vf x) const { return x * sigmoid(x * (kLinear + kCubic * x * x)); }
  ActGrad grad(vf x) const {
    const vf square = x * x, s = sigmoid(x * (kLinear + kCubic * square));
    return {x * s, s + x * s * (1.f - s) * (kLinear + 3.f * kCubic * square), vf{}};
  }
};

template <class Visit>
inline void with_function(const Group& g, const Visit& visit) {
  const Variant& v = g.variant;
  if (g.activation == Activation::kGELU) return v.plain ? visit(GELU{}) : visit(GELUTanh{});
  v.plain ? visit(SwiGLU{}) : visit(ClampedSwiGLU{v.limit, v.alpha, v.shift});
}

}  // namespace
}  // namespace MOE_LEVEL
}  // namespace moe
