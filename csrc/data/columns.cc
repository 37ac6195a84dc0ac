// XXH64, hexadecimal text, Philox and shuffles, the outer form of JSON lines.
#include "data/columns.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cstring>
#include <memory>

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

namespace {

// The stable order of `values`, ascending; fast because their upper bits are random.
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

}  // namespace

void philox(uint64_t key0, uint64_t key1, size_t n, uint64_t* out) {
  constexpr uint64_t kMultiplier0 = 0xD2E7470EE14C6C93, kMultiplier1 = 0xCA5A826395121157;
  constexpr uint64_t kWeyl0 = 0x9E3779B97F4A7C15, kWeyl1 = 0xBB67AE8584CAA73B;
  for (uint64_t begin = 0, counter = 1; begin < n; begin += 4, ++counter) {
    std::array<uint64_t, 4> block{counter, 0, 0, 0};
    uint64_t k0 = key0, k1 = key1;
    for (int round = 0; round < 10; ++round, k0 += kWeyl0, k1 += kWeyl1) {
      const auto product0 = static_cast<unsigned __int128>(kMultiplier0) * block[0];
      const auto product1 = static_cast<unsigned __int128>(kMultiplier1) * block[2];
      block = {static_cast<uint64_t>(product1 >> 64) ^ block[1] ^ k0, static_cast<uint64_t>(product1),
               static_cast<uint64_t>(product0 >> 64) ^ block[3] ^ k1, static_cast<uint64_t>(product0)};
    }
    std::copy_n(block.begin(), std::min<size_t>(4, n - begin), out + begin);
  }
}

void shuffle(uint64_t key0, uint64_t key1, size_t n, int64_t* order) {
  const std::unique_ptr<uint64_t[]> bits(new uint64_t[n]);
  philox(key0, key1, n, bits.get());
  argsort_bits(bits.get(), n, order);
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
