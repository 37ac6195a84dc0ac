// Row values in two bytes: bfloat16 and IEEE half precision. Pure functions, the same in C++, Python and on the GPU, bit
// for bit. Values are initialised and imported rounded to nearest even; an update rounds stochastically, so that steps far
// below the distance of two neighbouring numbers add up in the mean.
#pragma once

#include <cstdint>
#include <cstring>

#include "index/hashing.h"

namespace penstock {

enum class ValueType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

static inline uint32_t bytes_of(ValueType type) { return type == ValueType::kFloat32 ? 4 : 2; }

constexpr uint32_t kFloatSign = 0x80000000u;
constexpr uint32_t kFloatInfinity = 0x7F800000u;
constexpr uint32_t kHalfInfinity = 0x7C00u;
constexpr uint32_t kSmallestNormalHalf = 0x38800000u;  // 2^-14 as fp32
constexpr uint32_t kHalfBias = 112u << 23;  // between the exponents of fp32 and half precision

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Any NaN becomes this one, whatever its sign and payload.
static inline uint32_t quiet_nan(ValueType type) { return type == ValueType::kBFloat16 ? 0x7FC0u : 0x7E00u; }

// To nearest even. Beyond the largest number: infinity.
static inline uint16_t round_to_nearest(ValueType type, float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & ~kFloatSign, sign = (bits & kFloatSign) >> 16;
  if (magnitude > kFloatInfinity) return static_cast<uint16_t>(quiet_nan(type));
  if (type == ValueType::kBFloat16) return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  if (magnitude < kSmallestNormalHalf) {
    // The sum's last place is 2^-24, that of the result.
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  const uint32_t rounded = (magnitude - kHalfBias + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  return static_cast<uint16_t>(sign | (rounded < kHalfInfinity ? rounded : kHalfInfinity));
}

static inline float widen(ValueType type, uint16_t narrow) {
  if (type == ValueType::kBFloat16) return float_of(uint32_t{narrow} << 16);
  const uint32_t magnitude = narrow & 0x7FFFu, sign = uint32_t{narrow} << 16 & kFloatSign;
  if (magnitude < 0x400u) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
  if (magnitude < kHalfInfinity) return float_of(sign | ((magnitude << 13) + kHalfBias));
  return float_of(sign | kFloatInfinity | magnitude << 13 | (magnitude > kHalfInfinity ? 0x400000u : 0u));
}

// `count` values of a row, as they are stored, to fp32 and back; to nearest even.
static inline void widen_values(ValueType type, const void* stored, uint32_t count, float* values) {
  if (type == ValueType::kFloat32) {
    std::memcpy(values, stored, count * sizeof(float));
    return;
  }
  const uint16_t* const narrow = static_cast<const uint16_t*>(stored);
  for (uint32_t i = 0; i < count; ++i) values[i] = widen(type, narrow[i]);
}

static inline void store_values(ValueType type, const float* values, uint32_t count, void* stored) {
  if (type == ValueType::kFloat32) {
    std::memcpy(stored, values, count * sizeof(float));
    return;
  }
  uint16_t* const narrow = static_cast<uint16_t*>(stored);
  for (uint32_t i = 0; i < count; ++i) narrow[i] = round_to_nearest(type, values[i]);
}

// Bijection of 32-bit words (lowbias32). FORMAT, as are the next two: never change; penstock/embedding/rules/rounding.py is the
// same in numpy.
static inline uint32_t mix32(uint32_t x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

static inline uint32_t step_seed(uint64_t step) { return static_cast<uint32_t>(mix64(step + kGolden) >> 32); }

// The random bits that round the new value w of a column in an update are mix32(bits_of(w) ^ column_key): the upper 16 for
// bfloat16; for half precision the upper 13, or 24 where the result is subnormal. w is rounded away from 0 if those of its
// bits that are cut off, plus the random bits, carry over. (narrow_lanes.h)
static inline uint32_t column_key(uint32_t step_seed, uint32_t column) { return mix32(step_seed + column * 0x9E3779B9u); }

}  // namespace penstock
