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

// Random bits: Philox 4x64-10 (doi:10.1145/2063384.2063405) with this key, counters from 1 on; those of numpy's Philox.
void philox(uint64_t key0, uint64_t key1, size_t n,
            uint64_t* out);  // [n]

// A random order of 0 to n - 1: that in which the bits of `philox` ascend. FORMAT: never change; a resumed run shuffles
// its block anew.
void shuffle(uint64_t key0, uint64_t key1, size_t n,  // n < 2^32
             int64_t* order);                         // [n]

// Number (from 0) of the first line that has not the outer form of one JSON object: braces and brackets that close,
// nested at most 64 deep, nothing before or after; -1 if there is none. What stands within is not looked at.
int64_t find_non_object(const uint8_t* bytes, size_t size);

// Bytes equal to '\n'.
int64_t count_newlines(const uint8_t* bytes, size_t size);

}  // namespace penstock
