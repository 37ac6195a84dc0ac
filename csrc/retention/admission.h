// Which keys get rows: admission, counts, budgets.
//
// All of it is decided for a whole call at once, by functions of keys, counts and times alone, so that neither the order
// of the keys nor the number of threads matters.
#pragma once

#include <cstdint>
#include <vector>

#include "retention/clock.h"
#include "retention/eviction.h"
#include "retention/key_lists.h"
#include "retention/tallies.h"
#include "tables/key_finder.h"

namespace penstock {

// The misses of a call by shard of the index: those of shard s are all[begin[s] .. begin[s + 1]).
struct SortedMisses {
  Miss* all;
  std::vector<int64_t> begin;
};

class Admission {
 public:
  Admission(KeyedRows& rows, KeyLists& lists, Clock& clock, Eviction& eviction)
      : rows_(rows),
        lists_(lists),
        clock_(clock),
        eviction_(eviction),
        newcomers_(kNumShards),
        tallies_(rows.pool.num_threads(), Tallies(rows.tables.retains ? rows.tables.size() : 0)),
        row_thresholds_(rows.tables.size()),
        candidate_thresholds_(rows.tables.size()),
        crowd_of_table_(rows.tables.size(), kNoCrowd) {}

  // Gives rows to the missing keys that are admitted, or with `admits_all` to those for which there is room; the others read
  // their table's default row, or get no slot. in_use: slots that must not be evicted for them.
  Status admit(const SortedMisses& misses, bool admits_all, const std::vector<SlotSpan>& in_use);
  // Sets the counts of keys; those with a row are passed over.
  Status count_keys(uint32_t table, const int64_t* keys, const int64_t* counts, int64_t count);
  // After a call that was given up somewhere.
  void reset() noexcept;

 private:
  static constexpr uint32_t kNoCrowd = ~0u;
  // A key without a row, and its misses: [first .. last) of the sorted ones.
  struct Newcomer {
    uint64_t key;
    uint32_t table;
    uint32_t count;  // occurrences, with those counted before; at most kMaxCount
    int64_t first;
    int64_t last;
    bool is_wanted;
    bool is_candidate;  // counted before
    bool is_new = false;  // has got an entry of the index
    bool has_row = false;
  };
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

  void judge_shard(uint32_t shard, const SortedMisses& sorted, bool admits_all, Tallies& tallies);
  // Evicts for newcomers, and sets thresholds where that is not enough.
  void make_room(const Totals& totals, const std::vector<SlotSpan>& in_use);
  void set_thresholds(std::vector<Crowd>& crowds, bool of_rows);
  // Calls visit(newcomer, crowd) for the newcomers of the crowds' tables.
  template <typename Visit>
  void each_of_crowds(std::vector<Crowd>& crowds, const Visit& visit);
  void reserve_lists(const Totals& totals);
  void list_newcomers();
  Status admit_shard(uint32_t shard, const Miss* misses, bool admits_all, Tallies& tallies, int64_t* done);
  Status give_row(uint32_t shard, const Newcomer& newcomer, Entry* entry, uint64_t hash, uint32_t* slot);

  KeyedRows& rows_;
  KeyLists& lists_;
  Clock& clock_;
  Eviction& eviction_;
  std::vector<std::vector<Newcomer>> newcomers_;  // by shard
  std::vector<Tallies> tallies_;  // of each thread
  std::vector<Threshold> row_thresholds_, candidate_thresholds_;  // of the call at hand; none is set between calls
  std::vector<uint32_t> crowd_of_table_;  // kNoCrowd between loops
};

}  // namespace penstock
