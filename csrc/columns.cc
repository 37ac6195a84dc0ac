#include "columns.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

namespace penstock {
namespace {

constexpr uint64_t kPrime1 = 11400714785074694791ULL;
constexpr uint64_t kPrime2 = 14029467366897019727ULL;
constexpr uint64_t kPrime3 = 1609587929392839161ULL;
constexpr uint64_t kPrime4 = 9650029242287828579ULL;
constexpr uint64_t kPrime5 = 2870177450012600261ULL;

template <typename T>
T load(const unsigned char* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

uint64_t round64(uint64_t accumulator, uint64_t input) {
  return std::rotl(accumulator + input * kPrime2, 31) * kPrime1;
}

uint64_t merge(uint64_t hash, uint64_t accumulator) {
  return (hash ^ round64(0, accumulator)) * kPrime1 + kPrime4;
}

}  // namespace

uint64_t xxh64(const void* data, size_t size, uint64_t seed) {
  const auto* p = static_cast<const unsigned char*>(data);
  const unsigned char* const end = p + size;
  uint64_t hash;
  if (size >= 32) {
    uint64_t a = seed + kPrime1 + kPrime2, b = seed + kPrime2, c = seed, d = seed - kPrime1;
    for (; end - p >= 32; p += 32) {
      a = round64(a, load<uint64_t>(p));
      b = round64(b, load<uint64_t>(p + 8));
      c = round64(c, load<uint64_t>(p + 16));
      d = round64(d, load<uint64_t>(p + 24));
    }
    hash = std::rotl(a, 1) + std::rotl(b, 7) + std::rotl(c, 12) + std::rotl(d, 18);
    hash = merge(merge(merge(merge(hash, a), b), c), d);
  } else {
    hash = seed + kPrime5;
  }
  hash += size;
  for (; end - p >= 8; p += 8) hash = std::rotl(hash ^ round64(0, load<uint64_t>(p)), 27) * kPrime1 + kPrime4;
  for (; end - p >= 4; p += 4) {
    hash = std::rotl(hash ^ (load<uint32_t>(p) * kPrime1), 23) * kPrime2 + kPrime3;
  }
  for (; p != end; ++p) hash = std::rotl(hash ^ (*p * kPrime5), 11) * kPrime1;
  hash ^= hash >> 33;
  hash *= kPrime2;
  hash ^= hash >> 29;
  hash *= kPrime3;
  return hash ^ (hash >> 32);
}

namespace {

int64_t fold(uint64_t hash, uint64_t buckets) { return static_cast<int64_t>(buckets ? hash % buckets : hash); }

// Value of every hexadecimal digit; 0xff for all other bytes.
constexpr std::array<uint8_t, 256> kHexDigit = [] {
  std::array<uint8_t, 256> table{};
  table.fill(0xff);
  for (uint8_t d = 0; d < 10; ++d) table['0' + d] = d;
  for (uint8_t d = 0; d < 6; ++d) table['a' + d] = table['A' + d] = static_cast<uint8_t>(10 + d);
  return table;
}();

}  // namespace

template <typename Offset>
void hash_strings(const Offset* offsets, const uint8_t* bytes, size_t n, uint64_t seed, uint64_t buckets,
                  int64_t* out) {
  for (size_t i = 0; i < n; ++i) {
    out[i] = fold(xxh64(bytes + offsets[i], static_cast<size_t>(offsets[i + 1] - offsets[i]), seed), buckets);
  }
}

template <typename Integer>
void hash_integers(const Integer* values, size_t n, uint64_t seed, uint64_t buckets, int64_t* out) {
  char text[24];
  for (size_t i = 0; i < n; ++i) {
    const char* const end = std::to_chars(text, text + sizeof text, values[i]).ptr;
    out[i] = fold(xxh64(text, static_cast<size_t>(end - text), seed), buckets);
  }
}

void cross_keys(const int64_t* keys, const uint8_t* valid, size_t first_bit, size_t n, uint64_t* hashes) {
  for (size_t i = 0; i < n; ++i) {
    const bool present = !valid || (valid[(first_bit + i) >> 3] >> ((first_bit + i) & 7) & 1);
    unsigned char bytes[8];
    for (int b = 0; b < 8; ++b) bytes[b] = static_cast<unsigned char>(static_cast<uint64_t>(keys[i]) >> (8 * b));
    hashes[i] = xxh64(bytes, present ? sizeof bytes : 0, hashes[i]);
  }
}

template <typename Offset>
int64_t parse_hex(const Offset* offsets, const uint8_t* bytes, size_t n, int64_t* out) {
  for (size_t i = 0; i < n; ++i) {
    const uint8_t* p = bytes + offsets[i];
    const uint8_t* const end = bytes + offsets[i + 1];
    if (p == end || end - p > 16) return static_cast<int64_t>(i);
    uint64_t value = 0;
    uint8_t wrong = 0;
    for (; p != end; ++p) {
      const uint8_t digit = kHexDigit[*p];
      wrong |= digit;
      value = value << 4 | (digit & 0xf);
    }
    if (wrong & 0xf0) return static_cast<int64_t>(i);
    out[i] = static_cast<int64_t>(value);
  }
  return -1;
}

template void hash_strings(const int32_t*, const uint8_t*, size_t, uint64_t, uint64_t, int64_t*);
template void hash_strings(const int64_t*, const uint8_t*, size_t, uint64_t, uint64_t, int64_t*);
template void hash_integers(const int64_t*, size_t, uint64_t, uint64_t, int64_t*);
template void hash_integers(const uint64_t*, size_t, uint64_t, uint64_t, int64_t*);
template int64_t parse_hex(const int32_t*, const uint8_t*, size_t, int64_t*);
template int64_t parse_hex(const int64_t*, const uint8_t*, size_t, int64_t*);

JaggedWindow::JaggedWindow(std::vector<JaggedColumn> columns, std::vector<int64_t> starts, std::vector<int64_t> stops)
    : columns_(std::move(columns)), starts_(std::move(starts)) {
  num_features_ = starts_.empty() ? 0 : columns_.size() / starts_.size();
  ends_.reserve(stops.size());
  for (size_t p = 0; p < stops.size(); ++p) {
    num_rows_ += stops[p] - starts_[p];
    row_bits_ = std::max(row_bits_, static_cast<int>(std::bit_width(static_cast<uint64_t>(stops[p]))));
    ends_.push_back(num_rows_);
  }
}

bool JaggedWindow::one_key_a_bag() const {
  return std::all_of(columns_.begin(), columns_.end(), [](const JaggedColumn& column) { return !column.offsets; });
}

bool JaggedWindow::has_weights() const {
  return std::any_of(columns_.begin(), columns_.end(), [](const JaggedColumn& column) { return column.weights; });
}

bool JaggedWindow::has_small_places() const { return row_bits_ + std::bit_width(starts_.size()) <= 32; }

template <typename Place>
bool JaggedWindow::locate(const int64_t* rows, size_t n, Place* places) const {
  for (size_t i = 0; i < n; ++i) {
    const int64_t row = rows[i];
    if (row < 0 || row >= num_rows_) return false;
    size_t part = 0;
    while (row >= ends_[part]) ++part;
    const int64_t before = part ? ends_[part - 1] : 0;
    places[i] = static_cast<Place>(part) << row_bits_ | static_cast<Place>(starts_[part] + row - before);
  }
  return true;
}

template <typename Place>
void JaggedWindow::cut_offsets(const Place* const* places, size_t n, size_t batch, int64_t* out,
                               int64_t* starts) const {
  const Place mask = (Place{1} << row_bits_) - 1;
  // Lengths first, feature by feature; then each batch's sums.
  for (size_t f = 0; f < num_features_; ++f) {
    for (size_t begin = 0, b = 0; begin < n; begin += batch, ++b) {
      const size_t size = std::min(batch, n - begin);
      const Place* const of_rows = places[f] + begin;
      int64_t* const lengths = out + begin * num_features_ + b + f * size + 1;
      for (size_t i = 0; i < size; ++i) {
        const Place place = of_rows[i], row = place & mask;
        const int64_t* const offsets = columns_[(place >> row_bits_) * num_features_ + f].offsets;
        lengths[i] = offsets ? offsets[row + 1] - offsets[row] : 1;
      }
    }
  }
  *starts = 0;
  for (size_t begin = 0; begin < n; begin += batch) {
    int64_t total = 0;
    *out++ = 0;
    for (size_t bag = std::min(batch, n - begin) * num_features_; bag > 0; --bag, ++out) *out = total += *out;
    starts[1] = starts[0] + total;
    ++starts;
  }
}

template <typename Place, typename Element>
void JaggedWindow::cut_elements(const Element* JaggedColumn::*elements, const Place* const* places, size_t n,
                                size_t batch, const int64_t* offsets, const int64_t* starts, Element* out) const {
  struct Column {
    const Element* elements;
    const int64_t* offsets;
  };
  const Place mask = (Place{1} << row_bits_) - 1;
  const int row_bits = row_bits_;
  std::vector<Column> column(starts_.size());
  for (size_t f = 0; f < num_features_; ++f) {
    for (size_t p = 0; p < column.size(); ++p) {
      const JaggedColumn& from = columns_[p * num_features_ + f];
      column[p] = {from.*elements, from.offsets};
    }
    const Column* const columns = column.data();
    const bool absent = std::is_same_v<Element, float> && !column.empty() && !columns[0].elements;
    for (size_t begin = 0, b = 0; begin < n; begin += batch, ++b) {
      const size_t size = std::min(batch, n - begin);
      const Place* const place = places[f] + begin;
      const int64_t* const bags = offsets ? offsets + begin * num_features_ + b + f * size : nullptr;
      if (absent) {
        Element* const to = bags ? out + starts[b] + bags[0] : out + begin * num_features_ + f * size;
        std::fill_n(to, bags ? static_cast<size_t>(bags[size] - bags[0]) : size, Element{1});
        continue;
      }
      if (!bags) {
        Element* const to = out + begin * num_features_ + f * size;
        for (size_t i = 0; i < size; ++i) to[i] = columns[place[i] >> row_bits].elements[place[i] & mask];
        continue;
      }
      for (size_t i = 0; i < size; ++i) {
        const Column& from = columns[place[i] >> row_bits];
        const Place row = place[i] & mask;
        const Element* of_bag = from.elements + (from.offsets ? from.offsets[row] : static_cast<int64_t>(row));
        Element* to = out + starts[b] + bags[i];
        for (int64_t left = bags[i + 1] - bags[i]; left > 0; --left) *to++ = *of_bag++;
      }
    }
  }
}

template <typename Place>
void JaggedWindow::cut_values(const Place* const* places, size_t n, size_t batch, const int64_t* offsets,
                              const int64_t* starts, int64_t* out) const {
  cut_elements(&JaggedColumn::values, places, n, batch, offsets, starts, out);
}

template <typename Place>
void JaggedWindow::cut_weights(const Place* const* places, size_t n, size_t batch, const int64_t* offsets,
                               const int64_t* starts, float* out) const {
  cut_elements(&JaggedColumn::weights, places, n, batch, offsets, starts, out);
}

template bool JaggedWindow::locate(const int64_t*, size_t, uint32_t*) const;
template void JaggedWindow::cut_offsets(const uint32_t* const*, size_t, size_t, int64_t*, int64_t*) const;
template void JaggedWindow::cut_values(const uint32_t* const*, size_t, size_t, const int64_t*, const int64_t*,
                                       int64_t*) const;
template void JaggedWindow::cut_weights(const uint32_t* const*, size_t, size_t, const int64_t*, const int64_t*,
                                        float*) const;
template bool JaggedWindow::locate(const int64_t*, size_t, uint64_t*) const;
template void JaggedWindow::cut_offsets(const uint64_t* const*, size_t, size_t, int64_t*, int64_t*) const;
template void JaggedWindow::cut_values(const uint64_t* const*, size_t, size_t, const int64_t*, const int64_t*,
                                       int64_t*) const;
template void JaggedWindow::cut_weights(const uint64_t* const*, size_t, size_t, const int64_t*, const int64_t*,
                                        float*) const;

namespace {

// The same code for several instruction sets, where the compiler knows how; no result depends on which.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PENSTOCK_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define PENSTOCK_CLONES
#endif

constexpr size_t kTile = 256;

// masks[i] = all ones where bit `first + i` is set, else 0.
PENSTOCK_CLONES void expand_bits(const uint8_t* bits, size_t first, size_t n, uint64_t* masks) {
  const size_t whole = n / 8 * 8;
  for (size_t i = 0; i < whole; i += 8) {
    const size_t at = first + i;
    // The byte after is of this run only if these eight bits reach into it.
    const uint64_t next = at & 7 ? bits[(at >> 3) + 1] : 0;
    const uint64_t eight = (bits[at >> 3] | next << 8) >> (at & 7);
    for (size_t j = 0; j < 8; ++j) masks[i + j] = -(eight >> j & 1);
  }
  for (size_t i = whole; i < n; ++i) masks[i] = -static_cast<uint64_t>(bits[(first + i) >> 3] >> ((first + i) & 7) & 1);
}

// Puts `fill` where a mask is 0 or a number NaN; whether there was none such.
PENSTOCK_CLONES bool fill_tile(double* x, const uint64_t* masks, size_t n, double fill) {
  uint64_t whole = ~uint64_t{0};
  for (size_t i = 0; i < n; ++i) {
    const uint64_t present = masks[i] & -static_cast<uint64_t>(x[i] == x[i]);
    whole &= present;
    x[i] = std::bit_cast<double>((std::bit_cast<uint64_t>(x[i]) & present) | (std::bit_cast<uint64_t>(fill) & ~present));
  }
  return whole;
}

// sign(x) * log(1 + |x|), after fdlibm's log1p (FreeBSD msun, s_log1p.c): 1 + |x| = 2^k * (1 + f), and a polynomial of
// f / (2 + f); c makes up for what 1 + |x| rounds off. No branch, so that it vectorises.
PENSTOCK_CLONES void log_tile(double* x, size_t n) {
  constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  constexpr double kL1 = 6.666666666666735130e-01, kL2 = 3.999999999940941908e-01, kL3 = 2.857142874366239149e-01,
                   kL4 = 2.222219843214978396e-01, kL5 = 1.818357216161805012e-01, kL6 = 1.531383769920937332e-01,
                   kL7 = 1.479819860511658591e-01;
  constexpr uint64_t kOne = 0x3ff0000000000000, kRootHalf = 0x3fe6a09e00000000, kTwo52 = 0x4330000000000000;
  for (size_t i = 0; i < n; ++i) {
    const double a = std::fabs(x[i]);
    const double u = 1.0 + a;
    const double lost = a >= 1.0 ? 1.0 - (u - a) : a - (u - 1.0);
    const double c = lost / u;
    const uint64_t bits = std::bit_cast<uint64_t>(u) + (kOne - kRootHalf);
    // The exponent as a double, by way of the mantissa of 2^52.
    const double k = std::bit_cast<double>(bits >> 52 | kTwo52) - 4503599627370496.0 - 1023.0;
    const double f = std::bit_cast<double>((bits & 0x000fffffffffffff) + kRootHalf) - 1.0;
    const double half = 0.5 * f * f, s = f / (2.0 + f), z = s * s, w = z * z;
    const double r = w * (kL2 + w * (kL4 + w * kL6)) + z * (kL1 + w * (kL3 + w * (kL5 + w * kL7)));
    const double log = s * (half + r) + (k * kLn2Low + c) - half + f + k * kLn2High;
    // Infinity went through the exponent as a number.
    x[i] = std::copysign(a <= std::numeric_limits<double>::max() ? log : a, x[i]);
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

// Whether all are finite as float32.
PENSTOCK_CLONES bool store_tile(const double* x, size_t n, float* out, size_t stride) {
  bool finite = true;
  for (size_t i = 0; i < n; ++i) {
    const float v = static_cast<float>(x[i]);
    out[i * stride] = v;
    finite &= std::fabs(v) <= std::numeric_limits<float>::max();
  }
  return finite;
}

}  // namespace

void fill_missing(const int64_t* values, const uint8_t* valid, size_t first_bit, size_t n, int64_t missing,
                  int64_t* out) {
  uint64_t masks[kTile];
  for (size_t begin = 0; begin < n; begin += kTile) {
    const size_t size = std::min(kTile, n - begin);
    expand_bits(valid, first_bit + begin, size, masks);
    for (size_t i = 0; i < size; ++i) {
      const auto mask = static_cast<int64_t>(masks[i]);
      out[begin + i] = (values[begin + i] & mask) | (missing & ~mask);
    }
  }
}

template <typename T>
int64_t transform_numbers(const T* values, const uint8_t* valid, size_t first_bit, size_t n, const NumberPlan& plan,
                          float* out, size_t stride) {
  // A fill is a number of the column's type, as in numpy.
  const double fill = std::is_same_v<T, float> ? static_cast<float>(plan.fill_value) : plan.fill_value;
  double x[kTile];
  uint64_t masks[kTile];
  std::fill_n(masks, kTile, ~uint64_t{0});
  for (size_t begin = 0; begin < n; begin += kTile) {
    const size_t size = std::min(kTile, n - begin);
    for (size_t i = 0; i < size; ++i) x[i] = static_cast<double>(values[begin + i]);
    if (valid) expand_bits(valid, first_bit + begin, size, masks);
    const bool may_miss = valid || std::is_floating_point_v<T>;
    if (may_miss && !fill_tile(x, masks, size, fill) && !plan.fill) {
      for (size_t i = 0; i < size; ++i) {
        if (!masks[i] || values[begin + i] != values[begin + i]) return static_cast<int64_t>(begin + i);
      }
    }
    for (const NumberStep& step : plan.steps) {
      if (step.kind == NumberStep::kLog) {
        log_tile(x, size);
      } else if (step.kind == NumberStep::kClip) {
        clip_tile(x, size, step.a, step.b);
      } else {
        scale_tile(x, size, step.a, step.b);
      }
    }
    float* const to = out + begin * stride;
    if (!store_tile(x, size, to, stride)) {
      for (size_t i = 0; i < size; ++i) {
        if (!std::isfinite(to[i * stride])) return static_cast<int64_t>(begin + i);
      }
    }
  }
  return -1;
}

template int64_t transform_numbers(const int32_t*, const uint8_t*, size_t, size_t, const NumberPlan&, float*, size_t);
template int64_t transform_numbers(const int64_t*, const uint8_t*, size_t, size_t, const NumberPlan&, float*, size_t);
template int64_t transform_numbers(const float*, const uint8_t*, size_t, size_t, const NumberPlan&, float*, size_t);
template int64_t transform_numbers(const double*, const uint8_t*, size_t, size_t, const NumberPlan&, float*, size_t);

void argsort_bits(const uint64_t* values, size_t n, int64_t* order) {
  // One bucket a value on average, then the few of each bucket.
  const int bits = std::clamp(static_cast<int>(std::bit_width(n)), 1, 16);
  const int shift = 64 - bits;
  constexpr uint32_t kFew = 16;
  std::vector<uint32_t> ends((size_t{1} << bits) + 1);
  for (size_t i = 0; i < n; ++i) ++ends[(values[i] >> shift) + 1];
  for (size_t b = 1; b < ends.size(); ++b) ends[b] += ends[b - 1];
  for (size_t i = 0; i < n; ++i) order[ends[values[i] >> shift]++] = static_cast<int64_t>(i);
  uint32_t begin = 0;
  for (const uint32_t end : ends) {
    if (end - begin > kFew) {
      std::stable_sort(order + begin, order + end, [values](int64_t a, int64_t b) { return values[a] < values[b]; });
    } else {
      for (uint32_t i = begin + 1; i < end; ++i) {
        const int64_t moved = order[i];
        uint32_t to = i;
        for (; to > begin && values[order[to - 1]] > values[moved]; --to) order[to] = order[to - 1];
        order[to] = moved;
      }
    }
    begin = end;
  }
}

int64_t count_newlines(const uint8_t* bytes, size_t size) {
  int64_t count = 0;
  for (size_t i = 0; i < size; ++i) count += bytes[i] == '\n';
  return count;
}

int64_t find_non_object(const uint8_t* bytes, size_t size) {
  constexpr int kMaxDepth = 64;
  int64_t line = 0;
  for (size_t i = 0; i < size; ++i, ++line) {
    int depth = 0;
    bool seen = false, in_string = false;
    for (; i < size && bytes[i] != '\n'; ++i) {
      const uint8_t c = bytes[i];
      if (in_string) {
        if (c == '\\') {
          if (i + 1 < size && bytes[i + 1] != '\n') ++i;
        } else if (c == '"') {
          in_string = false;
        }
      } else if (c == ' ' || c == '\t' || c == '\r') {
        continue;
      } else if (depth == 0) {
        if (seen || c != '{') return line;
        seen = true;
        depth = 1;
      } else if (c == '"') {
        in_string = true;
      } else if (c == '{' || c == '[') {
        if (++depth > kMaxDepth) return line;
      } else if (c == '}' || c == ']') {
        --depth;
      }
    }
    if (!seen || depth != 0 || in_string) return line;
  }
  return -1;
}

}  // namespace penstock
