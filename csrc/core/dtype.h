// Dtype tags, and the two 16-bit storage types with their scalar conversions (round to nearest even, NaN kept).
#pragma once
#include <cstdint>
#include <cstring>

namespace moe {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt32 = 3, kBool = 4 };
constexpr int kFloatDtypes = 3;

static inline int64_t dtype_bytes(Dtype dtype) {
  return dtype == Dtype::kBool ? 1 : dtype == Dtype::kFloat32 || dtype == Dtype::kInt32 ? 4 : 2;
}

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline Dtype dtype_of(float) { return Dtype::kFloat32; }
inline Dtype dtype_of(bf16) { return Dtype::kBFloat16; }
inline Dtype dtype_of(fp16) { return Dtype::kFloat16; }

// Call body with a value of the storage type of a float dtype.
template <class Body>
void with_dtype(Dtype dtype, const Body& body) {
  if (dtype == Dtype::kFloat32) body(float{});
  if (dtype == Dtype::kBFloat16) body(bf16{});
  if (dtype == Dtype::kFloat16) body(fp16{});
}

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
static inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline float to_float(float value) { return value; }
static inline float to_float(bf16 value) { return float_of(uint32_t(value.bits) << 16); }
static inline float to_float(fp16 value) {
  const uint32_t magnitude = value.bits & 0x7FFFu, sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t special = magnitude >= 0x7C00u ? 0x7F800000u : 0;
  return float_of(bits_of(float_of(magnitude << 13) * 0x1p112f) | special | sign);  // exact for subnormals, too
}

static inline void assign(float& out, float value) { out = value; }
static inline void assign(bf16& out, float value) {
  const uint32_t bits = bits_of(value);
  out.bits = value != value ? uint16_t((bits >> 16) | 0x40) : uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
static inline void assign(fp16& out, float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (value != value)
    half = 0x7E00u;
  else if (magnitude >= 0x47800000u)  // 65536 and above
    half = 0x7C00u;
  else if (magnitude < 0x38800000u)  // subnormal: the sum with 0.5 rounds to a multiple of 2^-24
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
  else
    half = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  out.bits = uint16_t(half | sign);
}

}  // namespace moe
