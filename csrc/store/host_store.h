// Rows by (table, key) in this machine's memory: an index and two arenas (values, optimizer states), for all tables of
// one row layout.
//
// Calls may come from any thread, one at a time (a lock sees to it, which a fork of the process waits for); inside a call the
// work is split over the pool's threads: rows and index shards have one owner each, so there are no locks on the way. A call
// that runs out of memory says so, and leaves the store whole.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "retention/admission.h"
#include "retention/clock.h"
#include "retention/eviction.h"
#include "retention/key_lists.h"
#include "store/insertion.h"
#include "store/lookup.h"
#include "store/pooled_lookups.h"
#include "store/row_access.h"
#include "store/updates.h"
#include "system/fork.h"
#include "tables/key_finder.h"
#include "tables/keyed_rows.h"

namespace penstock {

struct StoreMemory {
  uint64_t rows;
  uint64_t free_slots;
  uint64_t slot_capacity;
  uint64_t index_bytes;
  uint64_t row_bytes;
};

// What never changes of a store.
struct StoreLayout : RowLayout {
  size_t num_tables;
  const char* isa;  // instruction set of its kernels
};

// The verbs of a store, one at a time; the parts do the work.
class HostStore {
 public:
  // Tables are numbered as in `tables`. Throws bad_alloc if there is no memory or address space.
  HostStore(const RowLayout& layout, OptimizerKind optimizer, const std::vector<TableRules>& tables,
            const StoreOptions& options);

  // Pools the batch into out [B, plan.stride]. With `insert`, absent keys get rows, where admitted; without, they read as
  // initial values or the default row. The plan must fit (see SharedPlan::fits); the batch is copied into the look-up, and its
  // arrays are looked at but once.
  Status pooled_lookup(std::shared_ptr<const SharedPlan> plan, const PackedKeys& batch, bool insert, float* out,
                       Lookup* lookup);

  // One optimizer step on every row that the look-ups touched, on the sum of its gradients; rows: how many. With
  // is_order_free the bits do not depend on the order of the samples either.
  // Values of two bytes are rounded by the number of the step. The look-ups are of this store and read as one plan does
  // (SharedPlan::reads_as), none of them applied yet; but for kHalfUpdated an error changes none of their rows.
  // With `defaults` (or null) what was refused in the look-ups changes nothing: default rows take theirs, which are not among
  // the rows counted.
  Status apply_gradients(std::vector<LookupGradient>& gradients, const Hyper* hypers, uint64_t step, bool is_order_free,
                         const DefaultGradients* defaults, int64_t* rows);
  // The norm of what apply_gradients would give to rows: the sum of |x|^order over the columns x of every row's summed
  // gradient; of the order infinity the largest |x|. Infinite where a gradient is not finite. Changes no row; those that are
  // missing are made, as for the update.
  Status gradient_norm(std::vector<LookupGradient>& gradients, double order, bool is_order_free, double* total);
  // The vector that each key of the plan's features read, into vectors [keys of the look-up, dim]; others are left alone. For
  // a look-up that was just made: rows are read as they are.
  Status read_looked_up(const Lookup& lookup, float* vectors);
  bool made(const Lookup& lookup) const { return lookup.store == number_; }

  // Values [n, dim] and state [n, state_dim]; absent keys read as initial or as the default row.
  Status find(uint32_t table, const int64_t* keys, int64_t count, bool insert, const FoundRows& out);

  // Writes rows, admitting every key; of equal keys the last one stays. inserted: rows that were new. Values of fp32 in a
  // store of another type are rounded to nearest.
  Status insert_or_assign(uint32_t table, const int64_t* keys, int64_t count, const GivenRows& rows, int64_t* inserted);

  Status erase(uint32_t table, const int64_t* keys, int64_t count, int64_t* erased);

  // Copies rows of a table from a cursor on; ends when it copies none. kStaleCursor: content_version() is not `version` any
  // more.
  Status export_batch(uint32_t table, uint64_t version, ExportedRows* out);

  // The same for keys that are counted but have no row.
  Status export_candidates(uint32_t table, uint64_t version, ExportedCounts* out);
  Status import_candidates(uint32_t table, const int64_t* keys, const int64_t* counts, int64_t count);
  uint64_t num_candidates(uint32_t table) const;

  // Moves the time on. Rows beyond their ttl leave, counts are halved. Costs what is due, not what there is.
  Status advance(uint64_t step, uint64_t seconds);

  // What a table remembers besides; value [dim] and state [state_dim] of its default row.
  RetentionNumbers retention(uint32_t table, float* value, float* state) const;
  // Of all tables: rows [T], candidates [T], numbers [T].
  void counters(int64_t* rows, int64_t* candidates, RetentionNumbers* numbers) const;
  void set_retention(uint32_t table, const RetentionNumbers& numbers, const float* value, const float* state);

  // Rises with every call that adds, removes or changes rows or counts: exports across it are torn.
  uint64_t content_version() const;

  uint64_t num_rows(uint32_t table) const { return rows_.tables.num_rows(table); }

  // Where the table's rows are, in the order of the index. False: there are not `count` of them.
  bool row_slots(uint32_t table, uint32_t* slots, size_t count) const;
  StoreMemory memory() const;
  uint64_t longest_probe() const;
  StoreLayout layout() const { return {rows_.layout, rows_.tables.size(), rows_.isa}; }

  // Empty, or what is wrong: every entry reachable, slots used once, rows + free slots = slots handed out.
  std::string check_invariants() const;

 private:
  // One call: alone, with empty lists, and whole again if it runs out of memory on its way.
  template <typename Body>
  Status call(const Body& body);
  void recount() noexcept;

  const uint64_t number_;  // of all stores of the process
  mutable ForkSafeMutex call_;
  KeyedRows rows_;
  KeyFinder finder_;
  KeyLists lists_;
  Clock clock_;
  Eviction eviction_;
  Admission admission_;
  Insertion insertion_;
  PooledLookups lookups_;
  Updates updates_;
  RowAccess access_;
};

}  // namespace penstock
