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
};

// The jagged columns of a window that lies in several chunks, none of them copied. Row r of the window is row
// starts[p] + r - (rows of the parts before p) of the chunk p that holds it. Chunks have under 2^32 rows.
class JaggedWindow {
 public:
  struct Place {
    uint32_t column;  // index in `columns` of feature 0 of the row's chunk
    uint32_t row;     // within the chunk
  };

  JaggedWindow(std::vector<JaggedColumn> columns,  // [parts * features], part by part
               std::vector<int64_t> starts,        // [parts] first row taken of each chunk
               std::vector<int64_t> stops);        // [parts]

  size_t num_features() const { return num_features_; }

  // The selection takes three calls: places of `rows` (false if one lies outside the window), offsets of their bags
  // packed feature by feature, and the values.
  bool locate(const int64_t* rows,  // [n]
              size_t n,
              Place* places) const;  // [n]
  void select_offsets(const Place* places, size_t n,
                      int64_t* out) const;  // [features * n + 1]
  void select_values(const Place* places, size_t n,
                     const int64_t* offsets,  // [features * n + 1], from select_offsets
                     int64_t* out) const;     // [offsets[features * n]]

 private:
  std::vector<JaggedColumn> columns_;
  std::vector<int64_t> starts_;
  std::vector<int64_t> ends_;  // rows of the window up to the end of each part
  size_t num_features_ = 0;
  int64_t num_rows_ = 0;
};

// Number (from 0) of the first line that has not the outer form of one JSON object: braces and brackets that close,
// nested at most 64 deep, nothing before or after; -1 if there is none. What stands within is not looked at.
int64_t find_non_object(const uint8_t* bytes, size_t size);

// Bytes equal to '\n'.
int64_t count_newlines(const uint8_t* bytes, size_t size);

}  // namespace penstock
