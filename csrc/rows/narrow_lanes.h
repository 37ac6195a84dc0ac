// Rows of two bytes a value, sixteen at a time (narrow.h says what the numbers are); part of row_kernels.cc, in the
// namespace of its build. Integer arithmetic, so that all instruction sets have the same bits.
#pragma once

#include "rows/lanes.h"
#include "rows/narrow.h"

namespace penstock {
namespace PENSTOCK_ISA {
namespace {

typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint16_t Narrow __attribute__((vector_size(kLanes * sizeof(uint16_t))));

inline Bits bits_of(Lanes lanes) {
  Bits bits;
  std::memcpy(&bits, &lanes, sizeof(bits));
  return bits;
}

inline Lanes lanes_of(Bits bits) {
  Lanes lanes;
  std::memcpy(&lanes, &bits, sizeof(lanes));
  return lanes;
}

template <ValueType kType>
inline Lanes widen(Narrow narrow) {
  if constexpr (kType == ValueType::kBFloat16) return lanes_of(__builtin_convertvector(narrow, Bits) << 16);
#if defined(__AVX512F__)
  __m256i half;
  std::memcpy(&half, &narrow, sizeof(half));
  const __m512 wide = _mm512_maskz_cvtph_ps(0xFFFF, half);
  Lanes lanes;
  std::memcpy(&lanes, &wide, sizeof(lanes));
  return lanes;
#elif defined(__F16C__)
  __m128i half[2];
  std::memcpy(half, &narrow, sizeof(half));
  const __m256 wide[2] = {_mm256_cvtph_ps(half[0]), _mm256_cvtph_ps(half[1])};
  Lanes lanes;
  std::memcpy(&lanes, wide, sizeof(lanes));
  return lanes;
#else
  const Bits bits = __builtin_convertvector(narrow, Bits);
  const Bits magnitude = bits & 0x7FFFu;
  const Lanes subnormal = __builtin_convertvector(magnitude, Lanes) * 0x1p-24f;
  Bits wide = (magnitude << 13) + kHalfBias;
  wide = magnitude < 0x400u ? bits_of(subnormal) : wide;
  const Bits special = kFloatInfinity | magnitude << 13;
  wide = magnitude >= kHalfInfinity ? special : wide;
  wide = magnitude > kHalfInfinity ? special | 0x400000u : wide;
  return lanes_of(wide | (bits << 16 & kFloatSign));
#endif
}

inline Bits mix32(Bits x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

// Stochastic rounding; `keys` are the columns' keys.
template <ValueType kType>
inline Narrow round_stochastic(Lanes value, Bits keys) {
  const Bits bits = bits_of(value), random = mix32(bits ^ keys);
  const Bits magnitude = bits & ~kFloatSign, sign = (bits & kFloatSign) >> 16;
  Bits rounded;
  if constexpr (kType == ValueType::kBFloat16) {
    rounded = (magnitude + (random >> 16)) >> 16;
    rounded = magnitude >= kFloatInfinity ? magnitude >> 16 : rounded;
  } else {
    const Bits normal = (magnitude - kHalfBias + (random >> 19)) >> 13;
    // In units of 2^-24, the last place of the result. Numbers that are subnormal in fp32 count as 0.
    const Lanes tiny = lanes_of(magnitude >= 0x00800000u ? magnitude : Bits{});
    const Lanes units = lanes_of(magnitude < kSmallestNormalHalf ? bits_of(tiny) : Bits{}) * 0x1p24f;
    const Integers whole = __builtin_convertvector(units, Integers);
    const Lanes fraction = (units - __builtin_convertvector(whole, Lanes)) * 0x1p24f;
    const Lanes draw = __builtin_convertvector(__builtin_convertvector(random >> 8, Integers), Lanes);
    // A comparison that holds is -1.
    const Bits subnormal = __builtin_convertvector(whole - (draw < fraction), Bits);
    rounded = magnitude < kSmallestNormalHalf ? subnormal : normal;
    rounded = rounded < kHalfInfinity ? rounded : Bits{} + kHalfInfinity;
  }
  rounded = magnitude > kFloatInfinity ? Bits{} + quiet_nan(kType) : rounded | sign;
  return __builtin_convertvector(rounded, Narrow);
}

// Columns beyond the dim read as 0.
template <typename S>
inline Narrow load_narrow(const S& shape, const uint16_t* row, int chunk) {
  Narrow narrow = {};
  if (width(shape, chunk) == kLanes) {
    std::memcpy(&narrow, row + chunk * kLanes, sizeof(Narrow));
  } else {
    std::memcpy(&narrow, row + chunk * kLanes, width(shape, chunk) * sizeof(uint16_t));
  }
  return narrow;
}

// How the values of a row lie in memory.
template <ValueType kType>
struct Stored {
  using Element = uint16_t;
  template <typename S>
  static Lanes load(const S& shape, const Element* row, int chunk) {
    return widen<kType>(load_narrow(shape, row, chunk));
  }
  static Element of(float value) { return round_to_nearest(kType, value); }
};
template <>
struct Stored<ValueType::kFloat32> {
  using Element = float;
  template <typename S>
  static Lanes load(const S& shape, const Element* row, int chunk) {
    return PENSTOCK_ISA::load(shape, row, chunk);
  }
  static Element of(float value) { return value; }
};

template <ValueType kType, typename S>
inline void widen_row(const S& shape, const uint16_t* row, float* value) {
  for (int c = 0; c < num_chunks(shape); ++c) store(shape, value, c, widen<kType>(load_narrow(shape, row, c)));
}

template <ValueType kType, typename S>
inline void round_row(const S& shape, const float* value, const uint32_t* keys, uint16_t* row) {
  for (int c = 0; c < num_chunks(shape); ++c) {
    Bits chunk_keys;
    std::memcpy(&chunk_keys, keys + c * kLanes, sizeof(chunk_keys));
    const Narrow rounded = round_stochastic<kType>(load(shape, value, c), chunk_keys);
    if (width(shape, c) == kLanes) {
      std::memcpy(row + c * kLanes, &rounded, sizeof(rounded));
    } else {
      std::memcpy(row + c * kLanes, &rounded, width(shape, c) * sizeof(uint16_t));
    }
  }
}

// Out of line and by type at run time: one copy a dim serves all optimizers.
template <typename S>
[[gnu::noinline]] void widen_row(const S& shape, ValueType type, const uint16_t* row, float* value) {
  if (type == ValueType::kBFloat16) {
    widen_row<ValueType::kBFloat16>(shape, row, value);
  } else {
    widen_row<ValueType::kFloat16>(shape, row, value);
  }
}

template <typename S>
[[gnu::noinline]] void round_row(const S& shape, ValueType type, const float* value, const uint32_t* keys, uint16_t* row) {
  if (type == ValueType::kBFloat16) {
    round_row<ValueType::kBFloat16>(shape, value, keys, row);
  } else {
    round_row<ValueType::kFloat16>(shape, value, keys, row);
  }
}

}  // namespace
}  // namespace PENSTOCK_ISA
}  // namespace penstock
