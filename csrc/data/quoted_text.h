// Where the rows of delimited text end when values may be quoted: at the line breaks outside of quotes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace penstock {

// What the next byte is read as.
enum QuoteState : uint8_t {
  kFieldStart = 0,  // a quote here opens a quoted value
  kUnquoted = 1,    // a quote here is text
  kQuoted = 2,
  kQuoteSeen = 3,   // after a quote in a quoted value: another one is a quote in the text, anything else ends the quotes
};

struct Dialect {
  uint8_t delimiter, quote;
};

// The state after `size` bytes from each of the four states, so that parts of a file can be looked at in any order.
std::array<uint8_t, 4> quote_states_after(const uint8_t* bytes, size_t size, Dialect dialect);

struct RowEnds {
  std::vector<int64_t> ends;  // of each row that ends: the place after its line feed
  // Numbers of the rows with a line break inside quotes and text after a closing quote: a quote is missing or stray.
  std::vector<int64_t> odd;
  QuoteState state;  // after the last byte
};

RowEnds find_row_ends(const uint8_t* bytes, size_t size, Dialect dialect, QuoteState state);

// Number (from 0) of the first line in which a quoted value opens and does not close, where lines are rows; -1 if there
// is none.
int64_t find_open_quote(const uint8_t* bytes, size_t size, Dialect dialect);

}  // namespace penstock
