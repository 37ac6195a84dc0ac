// The keys of each table that has eviction or counts keys, so that what looks through a table costs what the table holds.
//
// Listed are those with a row where the table evicts, and those counted. Of a table that is much of the index there is no
// list, if the index is large: its entries are found faster one after the other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "retention/key_list.h"
#include "tables/keyed_rows.h"

namespace penstock {

class KeyLists {
 public:
  KeyLists(KeyedRows& rows, uint64_t scan_from)
      : rows_(rows), scan_from_(scan_from), of_table_(rows.tables.size()), is_wanted_(rows.tables.size()) {}

  // Whether a table has keys to look through, and whether by a list.
  bool has_keys(uint32_t table) const { return policy(table).evicts || policy(table).min_count != 0; }
  bool is_kept(uint32_t table) const { return of_table_[table].is_kept; }
  // Positions of a table's keys: in its list, or the places of the index.
  uint64_t num_positions(uint32_t table) const { return is_kept(table) ? of_table_[table].keys.size() : rows_.num_places(); }
  // The keys of a table that its list is of.
  uint64_t num_keys(uint32_t table) const {
    return rows_.tables.candidates[table] + (policy(table).evicts ? rows_.tables.num_rows(table) : 0);
  }

  // Takes memory for more keys of a list that is kept, before there are any.
  void reserve(uint32_t table, uint64_t more) {
    if (is_kept(table)) of_table_[table].keys.reserve(of_table_[table].keys.size() + more);
  }
  void add(uint32_t table, uint64_t key) {
    if (is_kept(table)) of_table_[table].keys.push_back(key);
  }
  // The last key takes the place of this one.
  void remove(uint32_t table, uint64_t position) { of_table_[table].keys.remove(position); }
  // So many keys of a table are no longer its, or counted no more; with `repeats` they may come again beside themselves.
  void note_dead(uint32_t table, uint64_t number, bool repeats) {
    if (!is_kept(table)) return;
    of_table_[table].dead += number;
    of_table_[table].repeats |= repeats;
  }

  // Drops what is dead from a table's list.
  void tidy(uint32_t table);
  void tidy_if_worthwhile(uint32_t table);
  // Readies tables for being looked through: makes or drops lists, where that has become the better way, and tidies them.
  void choose_ways(const std::vector<uint32_t>& tables);
  // Calls visit(entry, position) for the keys of a tidy table at positions from `first`, `stride` apart.
  template <typename Visit>
  void each(uint32_t table, uint64_t first, uint64_t last, uint64_t stride, const Visit& visit) const {
    if (is_kept(table)) {
      each_listed(table, first, last, stride, visit);
    } else {
      each_place(table, first, last, stride, visit);
    }
  }

  uint64_t memory_bytes() const;
  // After a call that was given up somewhere.
  void reset() noexcept { std::fill(is_wanted_.begin(), is_wanted_.end(), 0); }
  // What is wrong with the list of a table of so many keys; empty: nothing.
  std::string check(uint32_t table, uint64_t expected) const;

 private:
  struct Listed {
    bool is_kept = true;
    KeyList keys;
    uint64_t dead = 0;     // no longer of the table, or there twice
    bool repeats = false;  // some may be there twice: erased, and inserted again
  };

  const RetentionPolicy& policy(uint32_t table) const { return rows_.tables.policies[table]; }
  template <typename Visit>
  void each_listed(uint32_t table, uint64_t first, uint64_t last, uint64_t stride, const Visit& visit) const;
  template <typename Visit>
  void each_place(uint32_t table, uint64_t first, uint64_t last, uint64_t stride, const Visit& visit) const;

  KeyedRows& rows_;
  const uint64_t scan_from_;
  std::vector<Listed> of_table_;
  std::vector<uint8_t> is_wanted_;  // by table, of those that get a list; 0 between calls
};

template <typename Visit>
void KeyLists::each_place(uint32_t table, uint64_t first, uint64_t last, uint64_t stride, const Visit& visit) const {
  const uint64_t ahead = 32 * stride;
  const Entry* const entries = rows_.entries();
  const bool evicts = policy(table).evicts, has_marks = rows_.layout.usage_dim != 0;
  const Rows marked = rows_.rows();  // by value: what visits write is nothing of it
  // An empty entry is of no table.
  const auto is_theirs = [&](const Entry& entry) {
    return entry.table() == table && !entry.is_empty() && (evicts || entry.slot() == kNoSlot);
  };
  for (uint64_t place = first; place < last; place += stride) {
    if (has_marks && ahead < last - place) {
      const Entry& later = entries[place + ahead];
      if (is_theirs(later) && later.slot() != kNoSlot) __builtin_prefetch(marked.usage(later.slot()));
    }
    if (is_theirs(entries[place])) visit(entries + place, place);
  }
}

template <typename Visit>
void KeyLists::each_listed(uint32_t table, uint64_t first, uint64_t last, uint64_t stride, const Visit& visit) const {
  // Three groups are under way: one whose lines of the index are on their way, one whose marks of use are, one at hand.
  constexpr uint64_t kGroup = 16;
  const IndexView index = rows_.index.view();
  const Rows marked = rows_.rows();
  const KeyList& keys = of_table_[table].keys;
  struct Group {
    uint64_t position, size;
    uint64_t hashes[kGroup];
    const Entry* entries[kGroup];
  };
  Group groups[3];
  for (Group& group : groups) group.size = 0;
  const uint64_t number = first < last ? (last - first + stride - 1) / stride : 0;
  const uint64_t rounds = (number + kGroup - 1) / kGroup + 2;
  for (uint64_t round = 0; round < rounds; ++round) {
    Group& next = groups[round % 3];
    next.position = first + round * kGroup * stride;
    next.size = round * kGroup < number ? std::min(kGroup, number - round * kGroup) : 0;
    for (uint64_t i = 0; i < next.size; ++i) {
      next.hashes[i] = index.hash(keys[next.position + i * stride], table);
      __builtin_prefetch(index.shard(next.hashes[i]) + index.home(next.hashes[i]));
    }
    Group& found = groups[(round + 2) % 3];
    for (uint64_t i = 0; i < found.size; ++i) {
      found.entries[i] = rows_.index.find(keys[found.position + i * stride], table, found.hashes[i]);
      const uint32_t slot = found.entries[i]->slot();
      if (marked.usage_dim != 0 && slot != kNoSlot) __builtin_prefetch(marked.usage(slot));
    }
    Group& ready = groups[(round + 1) % 3];
    for (uint64_t i = 0; i < ready.size; ++i) visit(ready.entries[i], ready.position + i * stride);
    ready.size = 0;
  }
}

}  // namespace penstock
