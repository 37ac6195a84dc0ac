// Validity bits to masks, numbers to float32 with fills, logarithm, clip and scale; vectorised.
#include "data/numbers.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "rows/clones.h"

namespace penstock {
namespace {

constexpr size_t kTile = 256, kCacheLine = 64;
constexpr uint32_t kInfinity = 0x7f800000, kWithoutSign = 0x7fffffff;

// Eight bytes, all ones where a bit of the index is set, else 0; the lowest bit comes first in memory.
constexpr std::array<std::array<int8_t, 8>, 256> kBytesOfBits = [] {
  std::array<std::array<int8_t, 8>, 256> table{};
  for (size_t bits = 0; bits < 256; ++bits) {
    for (size_t j = 0; j < 8; ++j) table[bits][j] = bits >> j & 1 ? -1 : 0;
  }
  return table;
}();

// masks[i] = all ones where bit `first + i` is set, else 0; i < n <= kTile.
void expand_bits(const uint8_t* bits, size_t first, size_t n, int8_t* masks) {
  const uint8_t* byte = bits + (first >> 3);
  const size_t shift = first & 7, whole = n / 8 * 8;
  for (size_t i = 0; i < whole; i += 8, ++byte) {
    // The byte after is of this run only if these eight bits reach into it.
    const unsigned two = *byte | (shift ? byte[1] << 8 : 0);
    std::memcpy(masks + i, &kBytesOfBits[two >> shift & 0xff], 8);
  }
  for (size_t i = whole; i < n; ++i) masks[i] = bits[(first + i) >> 3] >> ((first + i) & 7) & 1 ? -1 : 0;
}

PENSTOCK_CLONES void fill_keys(const int64_t* values, const int8_t* masks, size_t n, int64_t missing, int64_t* out) {
  for (size_t i = 0; i < n; ++i) out[i] = masks[i] ? values[i] : missing;
}

PENSTOCK_CLONES void load_tile(const int32_t* values, size_t n, double* x) {
  for (size_t i = 0; i < n; ++i) x[i] = static_cast<double>(values[i]);
}

PENSTOCK_CLONES void load_tile(const int64_t* values, size_t n, double* x) {
  for (size_t i = 0; i < n; ++i) x[i] = static_cast<double>(values[i]);
}

PENSTOCK_CLONES void load_tile(const float* values, size_t n, double* x) {
  for (size_t i = 0; i < n; ++i) x[i] = static_cast<double>(values[i]);
}

void load_tile(const double* values, size_t n, double* x) { std::copy_n(values, n, x); }

PENSTOCK_CLONES void blank_tile(const int8_t* masks, size_t n, double blank, double* x) {
  for (size_t i = 0; i < n; ++i) x[i] = masks[i] ? x[i] : blank;
}

PENSTOCK_CLONES void fill_tile(double* x, size_t n, double fill) {
  for (size_t i = 0; i < n; ++i) x[i] = x[i] == x[i] ? x[i] : fill;
}

// sign(x) * log(1 + |x|) within 2 ulp of a float: 1 + |x| = 2^k * (1 + f) in doubles, with f = |x| where k = 0, so that
// small numbers lose nothing; then the polynomial of Cephes (logf.c) in floats. No branch and no division, so that it
// vectorises and is fast.
PENSTOCK_CLONES void log_tile(double* x, size_t n) {
  constexpr uint64_t kOne = 0x3ff0000000000000, kRootHalf = 0x3fe6a09e00000000, kTwo52 = 0x4330000000000000;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  float f_of[kTile], k_of[kTile];
  for (size_t i = 0; i < n; ++i) {
    const double a = std::fabs(x[i]);
    const uint64_t bits = std::bit_cast<uint64_t>(1.0 + a) + (kOne - kRootHalf);
    // The exponent as a double, by way of the mantissa of 2^52.
    const double k = std::bit_cast<double>(bits >> 52 | kTwo52) - 4503599627370496.0 - 1023.0;
    const double m = std::bit_cast<double>((bits & 0x000fffffffffffff) + kRootHalf);
    f_of[i] = static_cast<float>(k == 0.0 ? a : m - 1.0);
    k_of[i] = static_cast<float>(k);
  }
  for (size_t i = 0; i < n; ++i) {
    const float f = f_of[i], k = k_of[i], z = f * f;
    float y = 7.0376836292e-2f;
    y = y * f - 1.1514610310e-1f;
    y = y * f + 1.1676998740e-1f;
    y = y * f - 1.2420140846e-1f;
    y = y * f + 1.4249322787e-1f;
    y = y * f - 1.6668057665e-1f;
    y = y * f + 2.0000714765e-1f;
    y = y * f - 2.4999993993e-1f;
    y = y * f + 3.3333331174e-1f;
    f_of[i] = (f + ((y * f * z + k * kLn2Low) - 0.5f * z)) + k * kLn2High;
  }
  for (size_t i = 0; i < n; ++i) {
    const double a = std::fabs(x[i]);
    // Infinity went through the exponent as a number, and NaN as well.
    const double log = a <= std::numeric_limits<double>::max() ? static_cast<double>(f_of[i]) : a;
    x[i] = std::copysign(log, x[i]);
  }
}

PENSTOCK_CLONES void clip_tile(double* x, size_t n, double low, double high) {
  for (size_t i = 0; i < n; ++i) {
    double v = x[i];
    v = v < low ? low : v;
    x[i] = v > high ? high : v;
  }
}

PENSTOCK_CLONES void scale_tile(double* x, size_t n, double offset, double factor) {
  for (size_t i = 0; i < n; ++i) x[i] = (x[i] - offset) * factor;
}

// To float32; the largest of their bits without the sign: from `kInfinity` on one is not finite.
PENSTOCK_CLONES uint32_t narrow_tile(const double* x, size_t n, float* out) {
  uint32_t most = 0;
  for (size_t i = 0; i < n; ++i) {
    const float v = static_cast<float>(x[i]);
    out[i] = v;
    const uint32_t bits = std::bit_cast<uint32_t>(v) & kWithoutSign;
    most = most > bits ? most : bits;
  }
  return most;
}

void apply(const std::vector<NumberStep>& steps, size_t n, double* x) {
  for (const NumberStep& step : steps) {
    if (step.kind == NumberStep::kLog) {
      log_tile(x, n);
    } else if (step.kind == NumberStep::kClip) {
      clip_tile(x, n, step.a, step.b);
    } else {
      scale_tile(x, n, step.a, step.b);
    }
  }
}

size_t bytes_of(NumberType type) { return type == NumberType::kInt32 || type == NumberType::kFloat32 ? 4 : 8; }

// Rows [begin, begin + size) of a column as doubles, `blank` where they are null.
void load_tile(const NumberColumn& column, size_t begin, size_t size, double blank, double* x) {
  // The next tile; with many columns the hardware loses track of them.
  const char* const ahead = static_cast<const char*>(column.values) + (begin + kTile) * bytes_of(column.type);
  for (size_t k = 0; k < kTile * bytes_of(column.type); k += kCacheLine) __builtin_prefetch(ahead + k);
  switch (column.type) {
    case NumberType::kInt32: load_tile(static_cast<const int32_t*>(column.values) + begin, size, x); break;
    case NumberType::kInt64: load_tile(static_cast<const int64_t*>(column.values) + begin, size, x); break;
    case NumberType::kFloat32: load_tile(static_cast<const float*>(column.values) + begin, size, x); break;
    case NumberType::kFloat64: load_tile(static_cast<const double*>(column.values) + begin, size, x); break;
  }
  if (!column.valid) return;
  int8_t masks[kTile];
  expand_bits(column.valid, column.first_bit + begin, size, masks);
  blank_tile(masks, size, blank, x);
}

// The first of n numbers that is NaN; n if there is none.
size_t find_nan(const double* x, size_t n) {
  return static_cast<size_t>(std::find_if(x, x + n, [](double v) { return v != v; }) - x);
}

// Transforms a tile of a column; the row in it that is bad, `size` if there is none.
size_t transform_tile(const NumberColumn& column, size_t begin, size_t size, float* out) {
  const NumberPlan& plan = *column.plan;
  const bool is_integral = column.type == NumberType::kInt32 || column.type == NumberType::kInt64;
  // A fill is a number of the column's type, as in numpy.
  const double fill = column.type == NumberType::kFloat32 ? static_cast<float>(plan.fill_value) : plan.fill_value;
  double x[kTile];
  load_tile(column, begin, size, plan.fill ? fill : std::numeric_limits<double>::quiet_NaN(), x);
  if (!plan.fill) {
    const size_t missing = column.valid || !is_integral ? find_nan(x, size) : size;
    if (missing < size) return missing;
  } else if (!is_integral) {
    fill_tile(x, size, fill);
  }
  apply(plan.steps, size, x);
  if (narrow_tile(x, size, out) < kInfinity) return size;
  return static_cast<size_t>(std::find_if_not(out, out + size, [](float v) { return std::isfinite(v); }) - out);
}

}  // namespace

void fill_missing(const int64_t* values, const uint8_t* valid, size_t first_bit, size_t n, int64_t missing,
                  int64_t* out) {
  int8_t masks[kTile];
  for (size_t begin = 0; begin < n; begin += kTile) {
    const size_t size = std::min(kTile, n - begin);
    expand_bits(valid, first_bit + begin, size, masks);
    fill_keys(values + begin, masks, size, missing, out + begin);
  }
}

BadNumber transform_numbers(const std::vector<NumberColumn>& columns, size_t n, float* out, size_t stride) {
  std::vector<int64_t> bad(columns.size(), -1);
  std::vector<std::array<float, kTile>> narrow(columns.size());
  // Tile by tile, so that each row is written once and at once.
  for (size_t begin = 0; begin < n; begin += kTile) {
    const size_t size = std::min(kTile, n - begin);
    for (size_t c = 0; c < columns.size(); ++c) {
      const size_t good = transform_tile(columns[c], begin, size, narrow[c].data());
      if (good < size && bad[c] < 0) bad[c] = static_cast<int64_t>(begin + good);
    }
    float* row = out + begin * stride;
    for (size_t i = 0; i < size; ++i, row += stride) {
      for (size_t c = 0; c < columns.size(); ++c) row[columns[c].position] = narrow[c][i];
    }
  }
  const auto first = std::find_if(bad.begin(), bad.end(), [](int64_t row) { return row >= 0; });
  if (first == bad.end()) return {-1, -1};
  return {first - bad.begin(), *first};
}

}  // namespace penstock
