// Where a key lives and what its row begins with: pure functions, the same in C++, Python and on the GPU, bit for bit.
#pragma once

#include <cstdint>

namespace penstock {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ULL;

constexpr uint64_t kMixFirst = 0xFF51AFD7ED558CCDULL;
constexpr uint64_t kMixSecond = 0xC4CEB9FE1A85EC53ULL;

// Finalizer of MurmurHash3: a bijection of 64-bit words. FORMAT: never change; initial values depend on it.
static inline uint64_t mix64(uint64_t x) {
  x ^= x >> 33;
  x *= kMixFirst;
  x ^= x >> 33;
  x *= kMixSecond;
  return x ^ (x >> 33);
}

enum class InitializerKind : int32_t { kUniform = 0, kNormal = 1, kConstant = 2 };

struct Initializer {
  InitializerKind kind;
  // Bound of the uniform, standard deviation of the normal, value of the constant.
  float scale;
  // Value of every float of the optimizer state.
  float state;
  // A hash of (seed, table name).
  uint64_t table_seed;
};

// First value of column `column` of the row of `key`. FORMAT: never change; a table's absent rows are this function.
static inline float initial_value(const Initializer& init, uint64_t row_seed, uint32_t column) {
  switch (init.kind) {
    case InitializerKind::kUniform: {
      const uint64_t bits = mix64(row_seed + (uint64_t{column} + 1) * kGolden);
      // 24 bits, centred: the integer is exact in float, so one rounding is left.
      return static_cast<float>(static_cast<int32_t>(bits >> 40) - (1 << 23)) * (init.scale * 0x1p-23f);
    }
    case InitializerKind::kNormal: {
      // Sum of twelve 16-bit uniforms: variance 2^32 - 1, mean 393210.
      int32_t sum = -393210;
      for (uint64_t draw = 1; draw <= 3; ++draw) {
        const uint64_t bits = mix64(row_seed + (uint64_t{column} * 3 + draw) * kGolden);
        sum += static_cast<int32_t>((bits & 0xFFFF) + ((bits >> 16) & 0xFFFF) + ((bits >> 32) & 0xFFFF) + (bits >> 48));
      }
      return static_cast<float>(sum) * (init.scale * 0x1p-16f);
    }
    case InitializerKind::kConstant:
      break;
  }
  return init.scale;
}

static inline uint64_t row_seed(const Initializer& init, uint64_t key) { return mix64(key ^ init.table_seed); }

}  // namespace penstock
