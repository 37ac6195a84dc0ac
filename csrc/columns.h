// Column functions of the data plane: plain arrays in, plain arrays out, no Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace penstock {

// XXH64 of `size` bytes. FORMAT: never change; keys of saved tables depend on it.
uint64_t xxh64(const void* data, size_t size, uint64_t seed);

// XXH64 of string i, which is bytes[offsets[i], offsets[i + 1]); modulo `buckets` unless that is 0.
// FORMAT: never change; keys of saved tables depend on it. Offset is int32_t or int64_t.
template <typename Offset>
void hash_strings(const Offset* offsets,  // [n + 1]
                  const uint8_t* bytes, size_t n, uint64_t seed, uint64_t buckets,
                  int64_t* out);  // [n]

// The same of the decimal text of integers ("-7"), so that 7 and "7" get one key. Integer is int64_t or uint64_t.
// FORMAT: never change.
template <typename Integer>
void hash_integers(const Integer* values,  // [n]
                   size_t n, uint64_t seed, uint64_t buckets,
                   int64_t* out);  // [n]

// Crosses another column into hashes: hashes[i] = XXH64 of the 8 bytes of keys[i], little-endian, with the seed
// hashes[i]; of no bytes where bit `first_bit + i` of `valid` is not set. FORMAT: never change.
void cross_keys(const int64_t* keys, const uint8_t* valid,  // valid: null if all are
                size_t first_bit, size_t n,
                uint64_t* hashes);  // [n], changed in place

// Reads 1 to 16 hexadecimal digits of either case; 16 digits fill the sign bit too. Returns the index of the first
// string that is something else, -1 if there is none; `out` is complete before that index.
template <typename Offset>
int64_t parse_hex(const Offset* offsets,  // [n + 1]
                  const uint8_t* bytes, size_t n,
                  int64_t* out);  // [n]

// One feature of one decoded chunk: bag r is values[offsets[r], offsets[r + 1]), or values[r] alone without offsets.
struct JaggedColumn {
  const int64_t* values;
  const int64_t* offsets;  // [rows + 1] or null
  const float* weights;    // by value; null, then in every part: each is 1
};

// The jagged columns of a window that lies in several chunks, none of them copied. Row r of the window is row
// starts[p] + r - (rows of the parts before p) of the chunk p that holds it. Chunks have under 2^32 rows.
class JaggedWindow {
 public:
  JaggedWindow(std::vector<JaggedColumn> columns,  // [parts * features], part by part
               std::vector<int64_t> starts,        // [parts] first row taken of each chunk
               std::vector<int64_t> stops);        // [parts]

  size_t num_features() const { return num_features_; }

  // Whether every bag has one key, so that offsets need not be made.
  bool one_key_a_bag() const;

  // Whether some column has weights, so that all get them.
  bool has_weights() const;

  // Whether a place fits into 32 bits: half the memory to pass over for each feature.
  bool has_small_places() const;

  // Cutting rows into batches takes a few calls: places of `rows` (false if one lies outside the window), offsets,
  // values and, if there are any, weights. Each batch is packed feature by feature, batch after batch; all have `batch`
  // rows but the last. Feature by feature over all batches, so that the source stays in cache. Features may be taken of
  // different rows, so each has places of its own. Place is uint64_t, or uint32_t if `has_small_places`.
  template <typename Place>
  bool locate(const int64_t* rows,  // [n]
              size_t n,
              Place* places) const;  // [n]
  // Offsets of every batch, from 0, batch after batch; and where the batches begin in the values.
  template <typename Place>
  void cut_offsets(const Place* const* places,  // [features][n]
                   size_t n, size_t batch,
                   int64_t* out,            // [features * n + batches]
                   int64_t* starts) const;  // [batches + 1]
  template <typename Place>
  void cut_values(const Place* const* places,  // [features][n]
                  size_t n, size_t batch,
                  const int64_t* offsets,  // from cut_offsets; null: one key a bag
                  const int64_t* starts,   // from cut_offsets; null: one key a bag
                  int64_t* out) const;     // [starts[batches]]
  template <typename Place>
  void cut_weights(const Place* const* places, size_t n, size_t batch, const int64_t* offsets, const int64_t* starts,
                   float* out) const;  // as cut_values; 1 where a column has none

 private:
  template <typename Place, typename Element>
  void cut_elements(const Element* JaggedColumn::*elements, const Place* const* places, size_t n, size_t batch,
                    const int64_t* offsets, const int64_t* starts, Element* out) const;

  std::vector<JaggedColumn> columns_;
  std::vector<int64_t> starts_;
  std::vector<int64_t> ends_;  // rows of the window up to the end of each part
  int row_bits_ = 0;  // a place is its part, shifted by these, and the row within the chunk
  size_t num_features_ = 0;
  int64_t num_rows_ = 0;
};

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

// Numbers to float32, by way of double, in every `stride`-th place of `out`; null or NaN is missing. Returns the first
// row that is missing without a fill, or not finite in the end; -1 if there is none. Same bits on every machine: the
// logarithm is computed here, within 1 ulp of a double. T is int32_t, int64_t, float or double.
template <typename T>
int64_t transform_numbers(const T* values, const uint8_t* valid,  // valid: null if all are
                          size_t first_bit, size_t n, const NumberPlan& plan, float* out, size_t stride);

// The stable order of `values`, ascending. Fast if their upper bits are random.
void argsort_bits(const uint64_t* values, size_t n,  // n < 2^32
                  int64_t* order);                   // [n]

// Number (from 0) of the first line that has not the outer form of one JSON object: braces and brackets that close,
// nested at most 64 deep, nothing before or after; -1 if there is none. What stands within is not looked at.
int64_t find_non_object(const uint8_t* bytes, size_t size);

// Bytes equal to '\n'.
int64_t count_newlines(const uint8_t* bytes, size_t size);

}  // namespace penstock
