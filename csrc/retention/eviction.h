// Which rows leave: eviction and ageing. Exact, and by functions of keys, marks of use and times alone.
//
// A table is looked through by its list of keys or, where it is much of the index, by the index; many tables and the parts of
// large ones side by side. Keys that leave are then taken out of the index, whose shards threads own one at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "retention/clock.h"
#include "retention/key_lists.h"
#include "tables/key_finder.h"

namespace penstock {

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

class Eviction {
 public:
  Eviction(KeyedRows& rows, KeyLists& lists, const Clock& clock)
      : rows_(rows), lists_(lists), clock_(clock), leavers_(rows.pool.num_threads()), is_due_(rows.tables.size()) {}

  // Rows leave for others, but for those of slots in use.
  void evict_lowest(std::vector<Due>& dues, const std::vector<SlotSpan>& in_use);
  // Rows that have not been used for longer than their table's ttl leave.
  void evict_expired(const std::vector<uint32_t>& tables);
  // Counts become 2^-n of what they were; those that become 0 are forgotten.
  void halve_counts(const Halvings& halvings);
  // Marks the rows of distinct slots of a table as used now.
  void mark_used(const uint32_t* slots, int64_t count, uint32_t table) const;
  // After a call that was given up somewhere.
  void reset() noexcept;

 private:
  // Part of a table, the `due`-th of those that a loop is about: of its list, or of the places of the index.
  struct Stretch {
    size_t due;
    uint32_t table;
    uint64_t first;
    uint64_t last;
  };
  struct alignas(64) Leavers {
    std::vector<Leaver> of_thread;
  };

  Leaver leaver_of(uint32_t table, const Entry& entry, uint64_t position, int64_t now) const;
  std::vector<Stretch> stretches(const std::vector<Due>& dues) const;
  std::vector<Leaver> lowest_of(const Stretch& part, const Due& due, int thread);
  void mark_in_use(const std::vector<Due>& dues, const std::vector<SlotSpan>& in_use, bool is_in_use);
  void guess_bound(Due& due) const;
  static void keep_lowest(std::vector<Leaver>& leavers, uint64_t count);
  // Takes keys out of lists and index, and rows out of the store; each element is of one table.
  void remove_keys(std::vector<std::vector<Leaver>>& of_tables);
  template <typename Judge, typename Settle>
  void sweep(const std::vector<uint32_t>& tables, const Judge& judge, const Settle& settle);

  KeyedRows& rows_;
  KeyLists& lists_;
  const Clock& clock_;
  std::vector<Leavers> leavers_;  // of each thread
  std::vector<uint8_t> is_due_;   // by table, of those that evict for newcomers; 0 between calls
  std::vector<uint64_t> in_use_bits_;  // by slot; clear between calls
};

}  // namespace penstock
