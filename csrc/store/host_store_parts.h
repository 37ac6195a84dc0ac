// What a host store keeps and counts by table, and what leaves one.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "store/key_list.h"

namespace penstock {

// What the newcomers of one call amount to, of one table.
struct Tally {
  int64_t wanted = 0;
  int64_t uncounted = 0;
  int64_t admitted = 0;
  int64_t refused = 0;
  int64_t candidates = 0;  // change of their number
  bool is_touched = false;
};
// Those of one thread. Clearing them costs what was touched, not what there is.
class Tallies {
 public:
  explicit Tallies(size_t tables) : of_table_(tables) {}
  Tally& operator[](uint32_t table) {
    Tally& tally = of_table_[table];
    if (!tally.is_touched) {
      touched_.push_back(table);
      tally.is_touched = true;
    }
    return tally;
  }
  const std::vector<uint32_t>& touched() const { return touched_; }
  void clear();

 private:
  std::vector<Tally> of_table_;
  std::vector<uint32_t> touched_;
};
using Totals = std::vector<std::pair<uint32_t, Tally>>;  // of the tables touched, in their order
// Which keys come in where there is not room for all: those of a lower precedence.
struct Threshold {
  uint64_t precedence = 0;
  bool is_set = false;
  bool admits(uint64_t other) const { return !is_set || other < precedence; }
};
// A table with more newcomers than places.
struct Crowd {
  uint32_t table;
  uint64_t places;
  uint64_t size;
  std::vector<uint64_t> precedences;
};
// The keys of a table that has eviction or counts keys: those with a row where it evicts, and those counted. So what looks
// through a table costs what the table holds, whatever else the index does. Of a table that is much of the index there is
// no list, if the index is large: its entries are found faster one after the other.
struct Listed {
  bool is_kept = true;
  KeyList keys;
  uint64_t dead = 0;     // no longer of the table, or there twice
  bool repeats = false;  // some may be there twice: erased, and inserted again
};
// A key that may leave: a row, or a count, which has no slot.
struct Leaver {
  uint64_t rank;  // of a row; of a count the place of its entry
  uint64_t key;
  uint64_t position;  // in the table's list, if it has one
  uint32_t table;
  uint32_t slot;
  uint32_t age;  // of a row; of a count what is left of it
};
// Rows that must leave a table, the lowest in the order of eviction.
struct Due {
  uint32_t table;
  uint64_t count;
  bool is_bounded = false;  // all that leave are below `bound`, probably
  Leaver bound{};
  uint64_t found = 0;
};
// Part of a table, the `due`-th of those that a loop is about: of its list, or of the places of the index.
struct Stretch {
  size_t due;
  uint32_t table;
  uint64_t first;
  uint64_t last;
};

// Calls something at the end of a scope, however it is left.
template <typename Call>
class AtEnd {
 public:
  explicit AtEnd(Call call) : call_(std::move(call)) {}
  ~AtEnd() { call_(); }
  AtEnd(const AtEnd&) = delete;
  AtEnd& operator=(const AtEnd&) = delete;

 private:
  Call call_;
};

}  // namespace penstock
