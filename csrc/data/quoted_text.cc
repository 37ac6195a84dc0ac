// Its implementation: 64 bytes at a time as bits, and a step from one quote that matters to the next.
#include "data/quoted_text.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace penstock {

namespace {

constexpr size_t kStretch = 64;

// Bit i is of byte i.
struct Bits {
  uint64_t quotes, newlines;
  uint64_t separators;  // delimiters and line ends
};

#if defined(__SSE2__)
uint64_t equal_bits(const __m128i (&bytes)[4], uint8_t value) {
  const __m128i wanted = _mm_set1_epi8(static_cast<char>(value));
  uint64_t bits = 0;
  for (int i = 0; i < 4; ++i) {
    const auto some = static_cast<uint16_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(bytes[i], wanted)));
    bits |= static_cast<uint64_t>(some) << (16 * i);
  }
  return bits;
}
#else
uint64_t equal_bits(const uint8_t (&bytes)[kStretch], uint8_t value) {
  uint64_t bits = 0;
  for (size_t i = 0; i < kStretch; ++i) bits |= static_cast<uint64_t>(bytes[i] == value) << i;
  return bits;
}
#endif

Bits bits_of(const uint8_t* bytes, size_t n, Dialect dialect) {
  uint8_t padded[kStretch];
  if (n < kStretch) {
    std::memset(padded, 0, kStretch);
    std::memcpy(padded, bytes, n);
    bytes = padded;
  }
#if defined(__SSE2__)
  __m128i part[4];
#else
  uint8_t part[kStretch];
#endif
  std::memcpy(part, bytes, kStretch);
  const uint64_t newlines = equal_bits(part, '\n');
  // A carriage return outside of quotes ends a row for the parser, so what follows begins a field.
  return {equal_bits(part, dialect.quote), newlines,
          newlines | equal_bits(part, '\r') | equal_bits(part, dialect.delimiter)};
}

// Bits `from` and above; from <= 64.
uint64_t since(size_t from) { return from < 64 ? ~uint64_t{0} << from : 0; }

// Goes through the `n` bytes of `bits`; 0 < n <= 64. Tells `seen` of the line feeds outside and inside of quotes, and
// of text right after a closing quote. Returns the state after them.
template <typename Seen>
uint8_t walk(const Bits& bits, size_t n, uint8_t state, Seen& seen) {
  const uint64_t begins = bits.separators << 1 | (state == kFieldStart);
  size_t place = 0;
  bool in_quotes = state == kQuoted;
  const auto leave_quotes = [&](size_t after) {
    in_quotes = bits.quotes >> after & 1;
    if (in_quotes) {
      place = after + 1;  // a doubled quote
    } else {
      place = after;
      if (!(bits.separators >> after & 1)) seen.text_after_quote();
    }
  };
  if (state == kQuoteSeen) leave_quotes(0);
  for (;;) {
    const uint64_t rest = since(place);
    const uint64_t turns = rest & (in_quotes ? bits.quotes : bits.quotes & begins);
    const uint64_t passed = turns ? rest & ~since(static_cast<size_t>(std::countr_zero(turns))) : rest;
    if (const uint64_t newlines = bits.newlines & passed) {
      in_quotes ? seen.newlines_in_quotes(newlines) : seen.newlines(newlines);
    }
    if (!turns) break;
    const auto turn = static_cast<size_t>(std::countr_zero(turns));
    if (!in_quotes) {
      in_quotes = true;
      place = turn + 1;
    } else if (turn + 1 == n) {
      return kQuoteSeen;
    } else {
      leave_quotes(turn + 1);
    }
  }
  if (in_quotes) return kQuoted;
  return bits.separators >> (n - 1) & 1 ? kFieldStart : kUnquoted;
}

struct Nothing {
  void newlines(uint64_t) {}
  void newlines_in_quotes(uint64_t) {}
  void text_after_quote() {}
};

struct Rows {
  RowEnds found;
  size_t begin = 0;
  bool has_break = false, has_text_after_quote = false;

  void newlines(uint64_t bits) {
    for (; bits; bits &= bits - 1) {
      if (has_break && has_text_after_quote) found.odd.push_back(static_cast<int64_t>(found.ends.size()));
      has_break = has_text_after_quote = false;
      found.ends.push_back(static_cast<int64_t>(begin) + std::countr_zero(bits) + 1);
    }
  }
  void newlines_in_quotes(uint64_t) { has_break = true; }
  void text_after_quote() { has_text_after_quote = true; }
};

struct OpenQuote : Nothing {
  int first = -1;
  void newlines_in_quotes(uint64_t bits) {
    if (first < 0) first = std::countr_zero(bits);
  }
};

}  // namespace

std::array<uint8_t, 4> quote_states_after(const uint8_t* bytes, size_t size, Dialect dialect) {
  std::array<uint8_t, 4> states{kFieldStart, kUnquoted, kQuoted, kQuoteSeen};
  Nothing nothing;
  for (size_t begin = 0; begin < size; begin += kStretch) {
    const size_t n = std::min(kStretch, size - begin);
    const Bits bits = bits_of(bytes + begin, n, dialect);
    for (uint8_t& state : states) state = walk(bits, n, state, nothing);
  }
  return states;
}

RowEnds find_row_ends(const uint8_t* bytes, size_t size, Dialect dialect, QuoteState from) {
  Rows rows;
  uint8_t state = from;
  for (rows.begin = 0; rows.begin < size; rows.begin += kStretch) {
    const size_t n = std::min(kStretch, size - rows.begin);
    state = walk(bits_of(bytes + rows.begin, n, dialect), n, state, rows);
  }
  rows.found.state = static_cast<QuoteState>(state);
  return std::move(rows.found);
}

int64_t find_open_quote(const uint8_t* bytes, size_t size, Dialect dialect) {
  OpenQuote open;
  uint8_t state = kFieldStart;
  for (size_t begin = 0; begin < size; begin += kStretch) {
    const size_t n = std::min(kStretch, size - begin);
    state = walk(bits_of(bytes + begin, n, dialect), n, state, open);
    if (open.first >= 0) return std::count(bytes, bytes + begin + open.first, '\n');
  }
  return state == kQuoted ? std::count(bytes, bytes + size, '\n') : -1;
}

}  // namespace penstock
