#include "parquet_pages.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "clones.h"
#include "compact_reader.h"

namespace penstock {
namespace {

static_assert(std::endian::native == std::endian::little, "Parquet's words are little-endian");

constexpr size_t kTile = 1024;

uint64_t load_word(const uint8_t* at) {
  uint64_t word;
  std::memcpy(&word, at, sizeof(word));
  return word;
}

// As `load_word` where fewer than 8 bytes may be left; what is missing reads as 0.
uint64_t load_word(const uint8_t* at, const uint8_t* end) {
  if (end - at >= 8) return load_word(at);
  uint64_t word = 0;
  if (at < end) std::memcpy(&word, at, static_cast<size_t>(end - at));
  return word;
}

using Type = CompactReader::Type;

// Fields of one of the headers within a header, by their numbers there; 0: it has none of that name.
struct DataFields {
  int encoding, level_encoding, level_bytes, repetition_bytes, is_compressed;
};
constexpr DataFields kDataFields{2, 3, 0, 0, 0}, kDictionaryFields{2, 0, 0, 0, 0}, kDataV2Fields{4, 0, 5, 6, 7};

bool read_data_header(CompactReader* from, Type type, const DataFields& fields, PageHeader* header) {
  if (type != CompactReader::kStruct) return false;
  from->read_struct([&](int64_t id, Type of) {
    if (id == 1) return from->read(of, &header->num_values);
    if (id == fields.encoding) return from->read(of, &header->encoding);
    if (id == fields.level_encoding) return from->read(of, &header->level_encoding);
    if (id == fields.level_bytes) return from->read(of, &header->level_bytes);
    if (id == fields.repetition_bytes) return from->read(of, &header->repetition_bytes);
    if (id == fields.is_compressed) return CompactReader::read(of, &header->is_compressed);
    return false;
  });
  return true;
}

// Values [first, first + n) of packed bits, one at a time.
void unpack_some(const uint8_t* packed, const uint8_t* end, int bit_width, size_t first, size_t n, uint32_t* out) {
  const uint64_t mask = (uint64_t{1} << bit_width) - 1;
  for (size_t i = 0; i < n; ++i) {
    const size_t bit = (first + i) * static_cast<size_t>(bit_width);
    out[i] = static_cast<uint32_t>(load_word(packed + bit / 8, end) >> (bit & 7) & mask);
  }
}

// Groups of eight values, each of kWidth bytes; 8 bytes beyond the last may be read.
template <int kWidth>
void unpack_groups(const uint8_t* packed, size_t groups, uint32_t* out) {
  constexpr uint64_t kMask = (uint64_t{1} << kWidth) - 1;
  for (size_t g = 0; g < groups; ++g, packed += kWidth, out += 8) {
    for (int k = 0; k < 8; ++k) {
      out[k] = static_cast<uint32_t>(load_word(packed + k * kWidth / 8) >> (k * kWidth & 7) & kMask);
    }
  }
}

using UnpackGroups = void (*)(const uint8_t*, size_t, uint32_t*);
constexpr auto kUnpackGroups = []<int... kWidth>(std::integer_sequence<int, kWidth...>) {
  return std::array<UnpackGroups, sizeof...(kWidth)>{&unpack_groups<kWidth>...};
}(std::make_integer_sequence<int, 33>());

void unpack(const uint8_t* packed, const uint8_t* end, int bit_width, size_t first, size_t n, uint32_t* out) {
  const size_t head = std::min(n, (0 - first) & 7);
  unpack_some(packed, end, bit_width, first, head, out);
  const uint8_t* const begin = packed + (first + head) / 8 * static_cast<size_t>(bit_width);
  size_t groups = (n - head) / 8;
  // What may be read beyond the last group is within the bytes.
  const auto bytes = static_cast<size_t>(std::max<ptrdiff_t>(end - begin - 8, 0));
  if (bit_width > 0) groups = std::min(groups, bytes / static_cast<size_t>(bit_width));
  if (groups > 0 && bit_width > 0) kUnpackGroups[static_cast<size_t>(bit_width)](begin, groups, out + head);
  if (bit_width == 0) groups = 0;
  const size_t done = head + groups * 8;
  unpack_some(packed, end, bit_width, first + done, n - done, out + done);
}

// out |= the lowest n bits of `bits`, n <= 32, from bit `at` on; 8 bytes from there are written.
void or_bits(uint64_t bits, size_t n, uint8_t* out, size_t at) {
  const uint64_t mask = (uint64_t{1} << n) - 1;
  const uint64_t word = load_word(out + at / 8) | (bits & mask) << (at & 7);
  std::memcpy(out + at / 8, &word, sizeof(word));
}

// As above, bit by byte, for a target that ends with its last bit.
void append_bits(const uint8_t* bits, size_t n, uint8_t* out, size_t at) {
  const size_t bytes = (n + 7) / 8, shift = at & 7;
  out += at / 8;
  if (shift == 0) {
    for (size_t b = 0; b < bytes; ++b) out[b] |= bits[b];
    return;
  }
  for (size_t b = 0; b < bytes; ++b) {
    out[b] |= static_cast<uint8_t>(bits[b] << shift);
    // Of the last byte perhaps nothing is left over, and no byte there to take it.
    if (const auto over = static_cast<uint8_t>(bits[b] >> (8 - shift))) out[b + 1] |= over;
  }
}

size_t count_bits(const uint8_t* bits, size_t n) {
  size_t count = 0, i = 0;
  for (; i + 64 <= n; i += 64) count += static_cast<size_t>(std::popcount(load_word(bits + i / 8)));
  const uint64_t rest = (uint64_t{1} << (n - i)) - 1;
  return n == i ? count : count + static_cast<size_t>(std::popcount(load_word(bits + i / 8) & rest));
}

PENSTOCK_CLONES uint32_t find_largest(const uint32_t* values, size_t n) {
  uint32_t most = 0;
  for (size_t i = 0; i < n; ++i) most = values[i] > most ? values[i] : most;
  return most;
}

// out[i] = the value of the dictionary, which need not be aligned, at indices[i].
template <typename Word>
void look_up(const uint8_t* dictionary, const uint32_t* indices, size_t n, Word* out) {
  for (size_t i = 0; i < n; ++i) std::memcpy(out + i, dictionary + indices[i] * sizeof(Word), sizeof(Word));
}

// out[i] = the next of `dense` where bit i is set, else 0; of whole groups of eight.
template <typename Word>
void spread(const Word* dense, const uint8_t* bits, size_t n, Word* out) {
  for (size_t i = 0; i < n; i += 8) {
    const Word byte = bits[i / 8];
    for (int k = 0; k < 8; ++k) {
      const Word bit = byte >> k & 1;
      out[i + static_cast<size_t>(k)] = *dense & (0 - bit);
      dense += bit;
    }
  }
}

}  // namespace

bool parse_page_header(const uint8_t* bytes, size_t size, PageHeader* header) {
  CompactReader from(bytes, bytes + size);
  from.read_struct([&](int64_t id, Type type) {
    switch (id) {
      case 1: return from.read(type, &header->kind);
      case 2: return from.read(type, &header->plain_bytes);
      case 3: return from.read(type, &header->bytes);
      case 4: return header->has_checksum = from.read(type, &header->checksum);
      case 5: return read_data_header(&from, type, kDataFields, header);
      case 7: return read_data_header(&from, type, kDictionaryFields, header);
      case 8: return read_data_header(&from, type, kDataV2Fields, header);
      default: return false;
    }
  });
  header->header_bytes = static_cast<size_t>(from.at() - bytes);
  if (!from.ok() || header->bytes < 0 || header->plain_bytes < 0) return false;
  if (header->kind == static_cast<int32_t>(PageKind::kIndex)) return true;
  return header->num_values >= 0 && header->level_bytes >= 0 && header->repetition_bytes >= 0;
}

HybridRuns::HybridRuns(const uint8_t* begin, const uint8_t* end, int bit_width)
    : at_(begin), end_(end), bit_width_(bit_width) {}

bool HybridRuns::begin_run() {
  while (left_ == 0) {
    uint64_t head = 0;
    for (int shift = 0;; shift += 7) {
      if (at_ == end_ || shift > 28) return false;
      head |= static_cast<uint64_t>(*at_ & 0x7f) << shift;
      if (!(*at_++ & 0x80)) break;
    }
    const auto rest = static_cast<size_t>(end_ - at_), width = static_cast<size_t>(bit_width_);
    left_ = head >> 1;
    is_packed_ = head & 1;
    if (is_packed_) {
      // Some writers leave out the padding of the last group.
      const size_t bytes = std::min(left_ * width, rest);
      left_ *= 8;
      if (width > 0) left_ = std::min(left_, bytes * 8 / width);
      packed_ = at_;
      packed_end_ = at_ += bytes;
      packed_at_ = 0;
    } else {
      const size_t bytes = (width + 7) / 8;
      if (bytes > rest) return false;
      value_ = 0;
      std::memcpy(&value_, at_, bytes);
      at_ += bytes;
    }
  }
  return true;
}

bool HybridRuns::read(size_t n, uint32_t* out) {
  while (n > 0) {
    if (!begin_run()) return false;
    const size_t some = std::min(n, left_);
    if (is_packed_) {
      unpack(packed_, packed_end_, bit_width_, packed_at_, some, out);
      packed_at_ += some;
    } else {
      std::fill_n(out, some, value_);
    }
    left_ -= some;
    out += some;
    n -= some;
  }
  return true;
}

bool HybridRuns::read_bits(size_t n, uint8_t* out) {
  for (size_t done = 0; done < n;) {
    if (!begin_run() || (!is_packed_ && value_ > 1)) return false;
    const size_t some = std::min(n - done, left_);
    for (size_t i = 0; i < some; i += 32) {
      const size_t at = packed_at_ + i;
      const uint64_t bits = is_packed_ ? load_word(packed_ + at / 8, packed_end_) >> (at & 7) : 0 - uint64_t{value_};
      or_bits(bits, std::min<size_t>(32, some - i), out, done + i);
    }
    packed_at_ += some;
    left_ -= some;
    done += some;
  }
  return true;
}

bool PageDecoder::set_dictionary(const uint8_t* bytes, size_t size, size_t num_values) {
  if (size / word_bytes_ < num_values) return false;
  dictionary_ = bytes;
  dictionary_size_ = num_values;
  return true;
}

bool PageDecoder::set_page(const PageHeader& header, const uint8_t* levels, size_t level_bytes, const uint8_t* bytes,
                           size_t size) {
  const uint8_t *at = bytes, *const end = bytes + size;
  left_ = 0;
  if (header.num_values < 0 || header.repetition_bytes != 0) return false;  // a flat column repeats nothing
  if (header.kind != static_cast<int32_t>(PageKind::kDataV2) && optional_) {
    uint32_t in_front;
    if (header.level_encoding != static_cast<int32_t>(PageEncoding::kRle) || size < sizeof(in_front)) return false;
    std::memcpy(&in_front, at, sizeof(in_front));
    at += sizeof(in_front);
    if (in_front > static_cast<size_t>(end - at)) return false;
    levels = at;
    level_bytes = in_front;
    at += in_front;
  }
  levels_ = HybridRuns(levels, levels + level_bytes, 1);
  const auto encoding = static_cast<PageEncoding>(header.encoding);
  by_index_ = encoding == PageEncoding::kPlainDictionary || encoding == PageEncoding::kRleDictionary;
  if (by_index_) {
    // A page of nulls alone may have nothing more.
    const int bit_width = at < end ? *at++ : 0;
    if (bit_width > 32) return false;
    indices_ = HybridRuns(at, end, bit_width);
  } else if (encoding != PageEncoding::kPlain) {
    return false;
  }
  plain_ = at;
  plain_end_ = end;
  left_ = static_cast<size_t>(header.num_values);
  return true;
}

// The next n values that are not null, n <= kTile.
template <typename Word>
bool PageDecoder::read_dense(size_t n, Word* out) {
  if (!by_index_) {
    if (static_cast<size_t>(plain_end_ - plain_) < n * sizeof(Word)) return false;
    std::memcpy(out, plain_, n * sizeof(Word));
    plain_ += n * sizeof(Word);
    return true;
  }
  uint32_t indices[kTile];
  if (!indices_.read(n, indices)) return false;
  if (n > 0 && find_largest(indices, n) >= dictionary_size_) return false;
  look_up(dictionary_, indices, n, out);
  return true;
}

template <typename Word>
bool PageDecoder::read_words(size_t n, Word* out, uint8_t* valid, size_t first_bit, size_t* num_nulls) {
  for (size_t done = 0; done < n; done += kTile) {
    const size_t some = std::min(kTile, n - done);
    if (!optional_) {
      if (!read_dense(some, out + done)) return false;
      continue;
    }
    uint8_t bits[kTile / 8 + 8] = {};
    if (!levels_.read_bits(some, bits)) return false;
    append_bits(bits, some, valid, first_bit + done);
    const size_t present = count_bits(bits, some);
    if (present == some) {
      if (!read_dense(some, out + done)) return false;
      continue;
    }
    *num_nulls += some - present;
    Word dense[kTile + 1];
    if (!read_dense(present, dense)) return false;
    dense[present] = 0;  // read, though not used, by the nulls at the end
    const size_t whole = some / 8 * 8;
    spread(dense, bits, whole, out + done);
    if (whole < some) {
      Word last[8];
      spread(dense + count_bits(bits, whole), bits + whole / 8, 8, last);
      std::copy_n(last, some - whole, out + done + whole);
    }
  }
  left_ -= n;
  return true;
}

bool PageDecoder::read(size_t n, void* out, uint8_t* valid, size_t first_bit, size_t* num_nulls) {
  if (n > left_) return false;
  if (word_bytes_ == 4) return read_words(n, static_cast<uint32_t*>(out), valid, first_bit, num_nulls);
  return read_words(n, static_cast<uint64_t*>(out), valid, first_bit, num_nulls);
}

}  // namespace penstock
