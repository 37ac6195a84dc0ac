// Finds the rows of many keys so that their cache misses overlap; part of row_kernels.cc, in the namespace of its build.
//
// A key's line of the index is prefetched some keys before it is compared, and its row some keys before it is read.
// Whether a line has the key cannot be foreseen, so that is no branch: the number of a key is written both to those found and
// to those that come late, and one of the two counts it. A late key looks at one more line each time it comes up.
#pragma once

#include "index/index.h"
#include "rows/lanes.h"
#include "rows/narrow_lanes.h"
#include "rows/row_kernels.h"

namespace penstock {
namespace PENSTOCK_ISA {
namespace {

constexpr int64_t kGroup = 8;       // keys of one step
constexpr int64_t kLineAhead = 16;  // keys between the prefetch of a line and its use, whole groups
constexpr int64_t kRowAhead = 8;    // the same of a row
constexpr int64_t kKeysAhead = 64;  // keys between the prefetch of keys and the hashing of them
constexpr int64_t kRing = 64;       // keys on their way between two steps, at most

// One bit in two for each entry of the line that is (key, table); at most one is set.
[[gnu::always_inline]] inline uint32_t match_line(const Entry* line, uint64_t key, uint64_t table) {
#if defined(__AVX512F__)
  const __m512i words = _mm512_load_si512(line);
  const uint32_t is_key = _mm512_cmpeq_epi64_mask(words, _mm512_set1_epi64(static_cast<int64_t>(key)));
  const __m512i tables = _mm512_srli_epi64(words, 48);
  const uint32_t is_table = _mm512_cmpeq_epi64_mask(tables, _mm512_set1_epi64(static_cast<int64_t>(table)));
  return is_key & (is_table >> 1) & 0x55;
#else
  uint32_t is_match = 0;
  for (uint32_t e = 0; e < kLineEntries; ++e) {
    is_match |= static_cast<uint32_t>((line[e].key == key) & (line[e].meta >> 48 == table)) << (2 * e);
  }
  return is_match;
#endif
}

// The slot of what match_line() found; any of the line's slots where that is nothing.
[[gnu::always_inline]] inline uint32_t matched_slot(const Entry* line, uint32_t is_match) {
  return line[static_cast<uint32_t>(__builtin_ctz(is_match | 0x80)) / 2].slot();
}

// Whether the line has a free entry: a key that comes this far is in this line or nowhere.
[[gnu::always_inline]] inline bool has_empty(const Entry* line) {
  bool is_empty = false;
  for (uint32_t e = 0; e < kLineEntries; ++e) is_empty |= line[e].is_empty();
  return is_empty;
}

// The tables of a run of keys: one for all.
struct OneTable {
  static constexpr bool kIsOne = true;
  const IndexView& index;
  uint32_t table;
  uint64_t mask;
  uint64_t num_lines;

  OneTable(const IndexView& index, uint32_t table)
      : index(index), table(table), mask(index.mask(table)), num_lines(index.num_lines()) {}
  [[gnu::always_inline]] uint32_t operator[](int64_t) const { return table; }
  [[gnu::always_inline]] const Entry* line(int64_t, uint64_t key) const {
    return index.entries + kLineEntries * IndexView::line(mix64(key ^ mask), num_lines);
  }
};

// The tables of a run of keys: each key's own.
struct TableOfEach {
  static constexpr bool kIsOne = false;
  const IndexView& index;
  const uint32_t* tables;

  [[gnu::always_inline]] uint32_t operator[](int64_t i) const { return tables[i]; }
  [[gnu::always_inline]] const Entry* line(int64_t i, uint64_t key) const {
    return index.entries + kLineEntries * IndexView::line(index.hash(key, tables[i]), index.num_lines());
  }
};

// Prefetches the lines of keys [first, first + count).
template <typename Tables>
[[gnu::always_inline]] inline void prefetch_lines(const Tables& tables, const uint64_t* keys, int64_t first, int64_t count,
                                                  const Entry** lines) {
#if defined(__AVX512F__)
  if constexpr (Tables::kIsOne) {
    if (count == kGroup) {
      // OneTable::line() for eight keys; an index has fewer than 2^32 lines.
      const auto fold = [](__m512i x) { return _mm512_xor_si512(x, _mm512_srli_epi64(x, 33)); };
      const auto all = [](uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); };
      __m512i hash = _mm512_xor_si512(_mm512_loadu_si512(keys + first), all(tables.mask));
      hash = _mm512_mullo_epi64(fold(hash), all(kMixFirst));
      hash = fold(_mm512_mullo_epi64(fold(hash), all(kMixSecond)));
      const __m512i low = _mm512_srli_epi64(_mm512_mul_epu32(hash, all(tables.num_lines)), 32);
      const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(hash, 32), all(tables.num_lines));
      const __m512i line = _mm512_srli_epi64(_mm512_add_epi64(low, high), 32);
      const __m512i begin = all(reinterpret_cast<uintptr_t>(tables.index.entries));
      _mm512_store_si512(lines, _mm512_add_epi64(begin, _mm512_slli_epi64(line, 6)));
      for (int64_t k = 0; k < kGroup; ++k) __builtin_prefetch(lines[k]);
      return;
    }
  }
#endif
  for (int64_t k = 0; k < count; ++k) {
    lines[k] = tables.line(first + k, keys[first + k]);
    __builtin_prefetch(lines[k]);
  }
}

// Prefetches a row, or the one line of the index that a late key waits for; which of the two is no branch.
template <int kLocality>
[[gnu::always_inline]] inline void prefetch_next(bool is_found, const void* row, const Entry* line, uint32_t value_bytes) {
  const char* address = static_cast<const char*>(is_found ? row : line);
  const size_t step = is_found ? 64 : 0;
  const char* const last = address + (is_found ? value_bytes - 1 : 0);
  __builtin_prefetch(address, 0, kLocality);
  for (uint32_t begin = 64; begin < value_bytes; begin += 64) __builtin_prefetch(address += step, 0, kLocality);
  // Bytes that do not fill lines may reach into one more.
  if (value_bytes % 64 != 0) __builtin_prefetch(last, 0, kLocality);
}

// Keys on their way from one step to the next: their numbers, and where the next step finds them.
template <typename Place>
struct Ring {
  Place place[kRing];
  uint32_t number[kRing];

  [[gnu::always_inline]] void put(int64_t at, Place where, int64_t i) {
    place[at & (kRing - 1)] = where;
    number[at & (kRing - 1)] = static_cast<uint32_t>(i);
  }
};

// Finds keys [0, count): slots[i] = kNoSlot where absent. Rows that are found are prefetched, and with kCopies
// copy_row(i, row) is called for each, in any order of i. Returns the number of absent keys.
template <bool kCopies, typename Tables, typename Copy>
[[gnu::always_inline]] inline int64_t probe(const Rows& rows, const uint64_t* keys, const Tables& tables, int64_t count,
                                            uint32_t value_bytes, uint32_t* slots, const Copy& copy_row) {
  // Rows that are read in this pass go to the first-level cache; those of a later one would not stay there.
  constexpr int kLocality = kCopies ? 3 : 2;
  alignas(64) const Entry* lines[kRing];
  Ring<const void*> found;
  Ring<const Entry*> late;
  // Apart from the rings, so that they stay in registers.
  int64_t found_begin = 0, found_end = 0, late_begin = 0, late_end = 0;
  int64_t absent = 0;
  const auto compare = [&](int64_t first, int64_t n) __attribute__((always_inline)) {
    for (int64_t i = first; i < first + n; ++i) {
      const Entry* const line = lines[i & (kRing - 1)];
      const uint32_t is_match = match_line(line, keys[i], tables[i]);
      const uint32_t slot = matched_slot(line, is_match);
      // An entry may count a key that has no row; it is late, and absent in the end.
      const bool is_found = (is_match != 0) & (slot != kNoSlot);
      const void* const row = rows.value(slot);
      slots[i] = slot;
      if constexpr (kCopies) found.put(found_end, row, i);
      late.put(late_end, line, i);
      found_end += kCopies & is_found;
      late_end += !is_found;
      prefetch_next<kLocality>(is_found, row, line + kLineEntries, value_bytes);
    }
  };
  const auto compare_late = [&](int64_t n) __attribute__((always_inline)) {
    for (; n > 0; --n, ++late_begin) {
      const int64_t i = late.number[late_begin & (kRing - 1)];
      const Entry* line = late.place[late_begin & (kRing - 1)];
      const bool is_absent = has_empty(line);
      line = tables.index.next_line(line, tables.index.hash(keys[i], tables[i]));
      const uint32_t is_match = match_line(line, keys[i], tables[i]);
      const uint32_t slot = matched_slot(line, is_match);
      const bool is_found = (is_match != 0) & (slot != kNoSlot) & !is_absent;
      const void* const row = rows.value(slot);
      slots[i] = is_found ? slot : kNoSlot;
      if constexpr (kCopies) found.put(found_end, row, i);
      late.put(late_end, line, i);
      found_end += kCopies & is_found;
      late_end += !is_found & !is_absent;
      absent += is_absent;
      prefetch_next<kLocality>(is_found, row, line + kLineEntries, value_bytes);
    }
  };
  const auto copy = [&](int64_t n) __attribute__((always_inline)) {
    for (; n > 0; --n, ++found_begin) {
      const int64_t at = found_begin & (kRing - 1);
      copy_row(found.number[at], found.place[at]);
    }
  };
  const auto at_most = [](int64_t n, int64_t left) __attribute__((always_inline)) { return n < left ? n : left; };
  for (int64_t begun = 0, compared = 0; compared < count;) {
    if (begun < count) {
      const int64_t n = at_most(kGroup, count - begun);
      // Else the load waits behind lines and rows for one of the buffers that all of them come through.
      __builtin_prefetch(keys + at_most(begun + kKeysAhead, count - 1));
      prefetch_lines(tables, keys, begun, n, lines + (begun & (kRing - 1)));
      begun += n;
      if (begun < count && begun <= kLineAhead) continue;
    }
    const int64_t n = at_most(kGroup, count - compared);
    compare(compared, n);
    compared += n;
    // Those that come late, and rows, wait for company unless there are no others to come.
    const int64_t late_wait = compared < count ? 2 * kGroup : 1, row_wait = compared < count ? kRowAhead + kGroup : 1;
    for (int64_t size; (size = late_end - late_begin) >= late_wait;) {
      compare_late(at_most(kGroup, size));
      if (kCopies && found_end - found_begin >= kRowAhead + kGroup) copy(kGroup);
    }
    for (int64_t size; (size = found_end - found_begin) >= row_wait;) copy(at_most(kGroup, size));
  }
  return absent;
}

}  // namespace
}  // namespace PENSTOCK_ISA
}  // namespace penstock
