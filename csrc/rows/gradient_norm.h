// The norm of the gradients of many rows, whose bits do not depend on their order.
#pragma once

#include <cstdint>
#include <cstring>

namespace penstock {

// Numbers >= 0, added up without rounding: their mantissas by exponent. Room for 2^39 of them.
struct GradientNorm {
  double order = 2;  // of the norm; infinity: the largest element
  float largest = 0;
  int64_t mantissas[256] = {};

  // Adds a sum of powers of elements, >= 0, infinite or NaN.
  [[gnu::always_inline]] void add(float power) {
    uint32_t bits;
    std::memcpy(&bits, &power, sizeof(bits));
    const uint32_t exponent = bits >> 23 & 255;
    mantissas[exponent] += static_cast<int64_t>(bits & 0x7FFFFF) + (exponent == 0 ? 0 : 0x800000);
  }

  [[gnu::always_inline]] void add(const GradientNorm& other) {
    for (int e = 0; e < 256; ++e) mantissas[e] += other.mantissas[e];
    largest = other.largest > largest ? other.largest : largest;
  }

  // The sum of all powers, or the largest element.
  double total() const {
    if (mantissas[255] != 0) return __builtin_inf();
    if (order == __builtin_inf()) return largest;
    double sum = 0;
    for (int e = 0; e < 255; ++e) {
      sum += __builtin_ldexp(static_cast<double>(mantissas[e]), (e == 0 ? 1 : e) - 150);
    }
    return sum;
  }
};

}  // namespace penstock
