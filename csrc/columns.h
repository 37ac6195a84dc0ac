// Column functions of the data plane: plain arrays in, plain arrays out, no Python.
#pragma once

#include <cstddef>
#include <cstdint>

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

// Rows of a jagged array packed feature by feature: bag (f, r) is values[offsets[f * width + r], ... + 1]).
// First call: offsets of the selection; false if a row lies outside [0, width). Second call: its values.
bool jagged_select_offsets(const int64_t* offsets,  // [features * width + 1]
                           size_t features, size_t width,
                           const int64_t* rows,  // [n]
                           size_t n,
                           int64_t* out);  // [features * n + 1]
void jagged_select_values(const int64_t* values,   // [offsets[features * width]]
                          const int64_t* offsets,  // [features * width + 1]
                          size_t features, size_t width,
                          const int64_t* rows,  // [n]
                          size_t n,
                          const int64_t* out_offsets,  // [features * n + 1]
                          int64_t* out);               // [out_offsets[features * n]]

// Bytes equal to '\n'.
int64_t count_newlines(const uint8_t* bytes, size_t size);

}  // namespace penstock
