// Columns of numbers and keys with missing ones, to plain arrays. Vectorised; the same bits on every machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace penstock {

// out[i] = values[i] where bit `first_bit + i` of `valid` is set, else `missing`.
void fill_missing(const int64_t* values, const uint8_t* valid, size_t first_bit, size_t n, int64_t missing,
                  int64_t* out);

// One of a list of functions that numbers go through.
struct NumberStep {
  enum Kind : int { kLog, kClip, kScale };
  int kind;
  double a, b;  // clip: low, high; scale: offset, factor
};

// What a missing number reads as, and what is done to all of them.
struct NumberPlan {
  bool fill;          // false: a missing number is an error
  double fill_value;  // finite
  std::vector<NumberStep> steps;
};

enum class NumberType { kInt32, kInt64, kFloat32, kFloat64 };

struct NumberColumn {
  const void* values;  // [n]
  NumberType type;
  const uint8_t* valid;  // null if all are
  size_t first_bit;      // of row 0 in `valid`
  const NumberPlan* plan;
  size_t position;  // in a row of the output
};

// Where the first column in order has its first number that is missing without a fill, or not finite in the end.
struct BadNumber {
  int64_t column, row;  // -1: there is none
};

// Numbers to float32, by way of double, in rows of `stride`; null or NaN is missing. The logarithm is computed here,
// within 2 ulp of a float32. Of a bad column nothing is said but where it is bad.
BadNumber transform_numbers(const std::vector<NumberColumn>& columns, size_t n, float* out, size_t stride);

}  // namespace penstock
