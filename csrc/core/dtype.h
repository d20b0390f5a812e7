// Dtype tags and the bf16 storage type (round to nearest even, NaN kept).
#pragma once
#include <cstdint>
#include <cstring>

namespace moe {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kInt32 = 2 };

inline int64_t dtype_bytes(Dtype dtype) { return dtype == Dtype::kBFloat16 ? 2 : 4; }

struct bf16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

}  // namespace moe
