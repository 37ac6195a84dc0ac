// Rows by (table, key) in this machine's memory: an index and two arenas (values, optimizer states), for all tables of
// one row layout.
//
// Calls may come from any thread, one at a time (a lock sees to it, which a fork of the process waits for); inside a call the
// work is split over the pool's threads: rows and index shards have one owner each, so there are no locks on the way. A call
// that runs out of memory says so, and leaves the store whole.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "system/buffer_pool.h"
#include "system/fork.h"
#include "index/index.h"
#include "store/host_store_parts.h"
#include "system/memory.h"
#include "store/retention.h"
#include "rows/row_kernels.h"
#include "store/shared_plan.h"
#include "system/thread_pool.h"

namespace penstock {

enum class Status {
  kOk,
  kOutOfMemory,   // the system gave no memory for rows; what was done before stays done
  kNoWorkingMemory,  // nor for what a call needs on its way; rows that it made stay
  kNoThreads,        // the system starts no more of them
  kHalfUpdated,      // no working memory when some rows had taken the step already
  kTooManyRows,   // 2^32 - 1 rows in one store
  kStaleCursor,   // the store changed while it was exported
  kBadOffsets,    // offsets do not rise from 0 to the number of keys
  kBadWeights,    // a weight is not finite
  kBagTooLong,    // a sequence has fewer positions than a bag has keys
  kIndexFull,     // internal: grow the index and go on
  kOverBudget,    // a table holds fewer rows than it was told to take
};

// What apply_gradients needs of a look-up: where each key's row is, and the batch: copies, so that the caller may do with his
// arrays as he likes. Arrays are by position in the packed keys; only the plan's features are filled.
struct Lookup {
  std::shared_ptr<const SharedPlan> plan;
  uint64_t store = 0;  // number of the one that made it; 0: none yet
  int64_t batch_size = 0;
  int64_t num_features = 0;
  int64_t num_keys = 0;
  uint32_t* slots = nullptr;         // [N]
  int64_t* keys = nullptr;           // [N]
  float* weights = nullptr;          // [N]; null: all 1
  int64_t* offsets = nullptr;        // [F * B + 1]; null: every bag holds one key
  uint64_t erase_version = 0;  // slots hold as long as no row was erased since
  int64_t num_missing = 0;  // keys read without a row (insert == false)
  bool is_applied = false;
  std::unique_ptr<BufferPool::Loan> memory;  // of the arrays

  PackedKeys batch() const {
    return {keys, offsets, batch_size, num_features, num_keys, weights, offsets == nullptr};
  }
};

constexpr uint64_t kMostUpdateKeys = (uint64_t{1} << 31) - 1;  // of all look-ups of one update

struct LookupGradient {
  Lookup* lookup;
  PackedKeys batch;  // the look-up's own
  const float* grad;  // [B, stride of the look-up's plan]
};

// A table as the store is given it.
struct TableRules {
  Initializer initializer;
  RetentionPolicy retention;
};

struct StoreMemory {
  uint64_t rows;
  uint64_t free_slots;
  uint64_t slot_capacity;
  uint64_t index_bytes;
  uint64_t row_bytes;
};

class HostStore {
 public:
  // Tables are numbered as in `tables`. max_bytes bounds the arenas' address range; 0: twice the machine's memory.
  // scan_from: places of an index that may be passed over, in place of a list, to look through a table that is much of it.
  HostStore(uint32_t dim, ValueType type, uint32_t state_dim, uint32_t usage_dim, OptimizerKind optimizer,
            const std::vector<TableRules>& tables, int num_threads, uint64_t max_bytes,
            std::string_view most_isa, uint64_t scan_from);

  // False: no memory or address space.
  bool open();

  // Pools the batch into out [B, plan.stride]. With `insert`, absent keys get rows, where admitted; without, they read as
  // initial values or the default row. The plan must fit (see SharedPlan::fits); the batch is copied into the look-up, and its
  // arrays are looked at but once.
  Status pooled_lookup(std::shared_ptr<const SharedPlan> plan, const PackedKeys& batch, bool insert, float* out,
                       Lookup* lookup);

  // One optimizer step on every row that the look-ups touched, on the sum of its gradients; rows: how many. With
  // is_order_free the bits do not depend on the order of the samples either.
  // Values of two bytes are rounded by the number of the step. The look-ups are of this store and read as one plan does
  // (SharedPlan::reads_as), none of them applied yet; but for kHalfUpdated an error changes none of their rows.
  Status apply_gradients(std::vector<LookupGradient>& gradients, const Hyper* hypers, uint64_t step, bool is_order_free,
                         int64_t* rows);
  // The norm of what apply_gradients would give to rows: the sum of |x|^order over the columns x of every row's summed
  // gradient; of the order infinity the largest |x|. Infinite where a gradient is not finite. Changes no row; those that are
  // missing are made, as for the update.
  Status gradient_norm(std::vector<LookupGradient>& gradients, double order, bool is_order_free, double* total);
  // The vector that each key of the plan's features read, into vectors [keys of the look-up, dim]; others are left alone. For
  // a look-up that was just made: rows are read as they are.
  Status read_looked_up(const Lookup& lookup, float* vectors);
  bool made(const Lookup& lookup) const { return lookup.store == number_; }

  // values [n, dim] and state [n, state_dim]; absent keys read as initial or as the default row. found[i]: the row was there
  // before the call.
  Status find(uint32_t table, const int64_t* keys, int64_t count, bool insert, float* values, float* state,
              bool* found);

  // Writes rows, admitting every key; of equal keys the last one stays. inserted: rows that were new. The values' type is
  // the store's, or fp32, which is rounded to nearest. usage [n, usage_dim]; null: used now, never before.
  Status insert_or_assign(uint32_t table, const int64_t* keys, int64_t count, ValueType type, const void* values,
                          const float* state, const int64_t* usage, int64_t* inserted);

  Status erase(uint32_t table, const int64_t* keys, int64_t count, int64_t* erased);

  static constexpr uint64_t kExported = ~uint64_t{0};  // a cursor behind the last row

  // Copies up to max_rows rows of a table from *cursor on (0 at first) and moves it; ends when it returns 0 rows.
  // Values come in the store's type. kStaleCursor: content_version() is not `version` any more.
  Status export_batch(uint32_t table, uint64_t* cursor, uint64_t version, int64_t max_rows, int64_t* keys,
                      void* values, float* state, int64_t* usage, int64_t* rows);

  // The same for keys that are counted but have no row.
  Status export_candidates(uint32_t table, uint64_t* cursor, uint64_t version, int64_t max_keys, int64_t* keys,
                           int64_t* counts, int64_t* exported);
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

  uint64_t num_rows(uint32_t table) const { return rows_of_table_[table].load(std::memory_order_relaxed); }

  // Where the table's rows are, in the order of the index. False: there are not `count` of them.
  bool row_slots(uint32_t table, uint32_t* slots, size_t count) const;
  StoreMemory memory() const;
  uint64_t longest_probe() const;
  const char* isa() const { return isa_; }
  ValueType type() const { return type_; }
  int num_threads() const { return pool_.num_threads(); }
  size_t num_tables() const { return initializers_.size(); }
  uint32_t dim() const { return dim_; }
  uint32_t state_dim() const { return state_dim_; }
  uint32_t usage_dim() const { return usage_dim_; }

  // Empty, or what is wrong: every entry reachable, slots used once, rows + free slots = slots handed out.
  std::string check_invariants() const;

 private:
  struct Miss {
    uint64_t key;
    uint32_t table;
    uint32_t* slot;  // where to write the answer
  };
  static constexpr uint32_t kNoNumber = ~0u;
  static constexpr uint64_t kLeastExtent = 16;  // slots; all extents are multiples of it
  struct alignas(64) ShardSlots {
    std::vector<uint32_t> free;
    uint32_t next = 0;
    uint32_t end = 0;  // [next, end) is this shard's current extent
  };
  // A key without a row, and its misses: sorted_misses_[first .. last).
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
  // Slots that the call at hand has found, so that they stay.
  struct SlotSpan {
    uint32_t table;
    const uint32_t* slots;
    int64_t count;
  };
  // Keys of short runs on their way to the find kernel.
  struct KeyChunk {
    static constexpr int64_t kCapacity = 1024;
    uint64_t keys[kCapacity];
    uint32_t tables[kCapacity];
    uint32_t slots[kCapacity];
    uint32_t* targets[kCapacity];
    int64_t count = 0;
  };
  struct alignas(64) ThreadScratch {
    std::vector<Miss> misses;
    std::unique_ptr<KeyChunk> chunk = std::make_unique<KeyChunk>();
    std::vector<Occurrence> occurrences;
    std::vector<uint64_t> hash_slots;
    std::vector<uint32_t> unique_of, unique_slot, begin, order;
    std::vector<float> sums;
    int64_t rows = 0;
    Tallies tallies{0};
    std::vector<uint32_t> freed;
    std::vector<Leaver> leavers;
  };
  // Where the rows of some tables are in the index, table by table, so that an export of many small tables passes over the
  // index a few times in all. Holds as long as no row comes or goes.
  struct ExportOrder {
    uint32_t first = 0;  // the tables are first, first + 1, ..., after the last one 0
    std::vector<uint64_t> begin;  // [tables + 1]
    std::vector<uint64_t> places;
  };

  // What a tile has to pool after its keys were found: scratch_[thread].misses[first .. last), and the others too unless
  // they are pooled already.
  struct TileMisses {
    int thread;
    bool others_are_pooled;
    size_t first;
    size_t last;
  };

  // Keys of one table of the plan that one thread updates: those of `part` among `parts`, by slot.
  struct Unit {
    uint32_t table;
    uint32_t part;
    uint32_t parts;
    int64_t first;  // features of the table: plan.by_table[first .. last)
    int64_t last;
  };

  // One call: alone, with empty lists, and whole again if it runs out of memory on its way.
  template <typename Body>
  Status call(const Body& body) {
    const std::lock_guard<ForkSafeMutex> guard(call_);
    for (ThreadScratch& scratch : scratch_) {
      scratch.misses.clear();
      scratch.chunk->count = 0;
    }
    Status status;
    try {
      status = body();
    } catch (const std::bad_alloc&) {
      status = Status::kNoWorkingMemory;
    } catch (const std::system_error&) {
      status = Status::kNoThreads;
    }
    if (status == Status::kNoWorkingMemory || status == Status::kNoThreads) recount();
    return status;
  }
  void recount() noexcept;

  // host_store_lookup.cc
  Status look_up(const PoolingPlan& plan, const PackedKeys& given, bool insert, float* out, Lookup* lookup);
  Status take_batch(const PoolingPlan& plan, const PackedKeys& given, Lookup* lookup);
  bool is_one_hot(const PackedKeys& given);
  Status take_offsets(const PackedKeys& given, int64_t* offsets);
  bool take_weights(const PackedKeys& given, float* weights);
  static void take_keys(const PoolingPlan& plan, const PackedKeys& batch, const int64_t* given, const Tile& tile,
                        int64_t* keys);
  void find_tile(const PoolingPlan& plan, const PackedKeys& batch, const Tile& tile, uint32_t* slots,
                 ThreadScratch& scratch);
  // Finds and pools in one pass, where each bag is one key: no other wait for a row than that of the machine.
  void look_up_tile(const PoolingPlan& plan, const PackedKeys& batch, const Tile& tile, uint32_t* slots, bool stream,
                    float* out, ThreadScratch& scratch);
  void pool_missed(const PoolingPlan& plan, const PackedKeys& batch, const TileMisses& missed, const Tile& tile,
                   const uint32_t* slots, bool stream, float* out);
  // Some keys may wait in the thread's chunk until it is flushed.
  void find_keys(const int64_t* keys, int64_t count, uint32_t table, uint32_t* slots, ThreadScratch& scratch);
  void flush(ThreadScratch& scratch);
  static void note_misses(const uint64_t* keys, int64_t count, uint32_t table, uint32_t* slots, ThreadScratch& scratch);
  enum class Insert { kNever, kAdmitted, kAll };
  Status read(uint32_t table, const int64_t* keys, int64_t count, bool insert, float* values, float* state, bool* found);
  Status assign(uint32_t table, const int64_t* keys, int64_t count, ValueType type, const void* values, const float* state,
                const int64_t* usage, int64_t* inserted);
  Status copy_counts(uint32_t table, uint64_t* cursor, uint64_t version, int64_t max_keys, int64_t* keys, int64_t* counts,
                     int64_t* exported);
  Status count_keys(uint32_t table, const int64_t* keys, const int64_t* counts, int64_t count);
  Status copy_batch(uint32_t table, uint64_t* cursor, uint64_t version, int64_t max_rows, int64_t* keys, void* values,
                    float* state, int64_t* usage, int64_t* rows);
  Status locate(uint32_t table, const int64_t* keys, int64_t count, Insert insert, std::vector<uint32_t>* slots);
  std::vector<int64_t> sort_misses();
  // Gives rows to the keys that were not found. in_use: slots that must not be evicted for them.
  Status insert_misses(Insert insert, const std::vector<SlotSpan>& in_use);
  Status insert_shard(uint32_t shard, const Miss* misses, int64_t count, int64_t* done);
  // Calls insert(shard, thread) for every shard; again for all after the index had to grow for one.
  Status insert_by_shard(const std::function<Status(uint32_t, int)>& insert);

  // host_store_retention.cc
  bool is_listed(uint32_t table) const { return policies_[table].evicts || policies_[table].min_count != 0; }
  Status admit_misses(const std::vector<int64_t>& begin, bool admits_all, const std::vector<SlotSpan>& in_use);
  void judge_shard(uint32_t shard, int64_t first, int64_t last, bool admits_all, Tallies& tallies);
  // Evicts for newcomers, and sets thresholds where that is not enough.
  void make_room(const Totals& totals, const std::vector<SlotSpan>& in_use);
  void set_thresholds(std::vector<Crowd>& crowds, bool of_rows);
  // Calls visit(newcomer, crowd) for the newcomers of the crowds' tables.
  template <typename Visit>
  void each_of_crowds(std::vector<Crowd>& crowds, const Visit& visit);
  void reserve_lists(const Totals& totals);
  void list_newcomers();
  Status admit_shard(uint32_t shard, bool admits_all, Tallies& tallies, int64_t* done);
  Status give_row(uint32_t shard, const Newcomer& newcomer, Entry* entry, uint64_t hash, uint32_t* slot);
  Totals take_totals();

  // host_store_eviction.cc, host_store_time.cc
  // Drops what is dead from a table's list.
  void tidy(uint32_t table);
  void tidy_if_worthwhile(uint32_t table);
  // The entries of a table that its list is of.
  uint64_t num_listed(uint32_t table) const {
    return candidates_of_table_[table] + (policies_[table].evicts ? num_rows(table) : 0);
  }
  // Readies tables for being looked through: makes or drops lists, where that has become the better way, and tidies them.
  void choose_ways(const std::vector<uint32_t>& tables);
  uint64_t num_places() const { return index_.capacity() * kNumShards; }
  // Calls visit(entry, position) for the keys of a tidy list from `first`, `stride` apart.
  template <typename Visit>
  void each_listed(uint32_t table, uint64_t first, uint64_t last, uint64_t stride, const Visit& visit) const;
  // The same for entries at places of the index.
  template <typename Visit>
  void each_place(uint32_t table, uint64_t first, uint64_t last, uint64_t stride, const Visit& visit) const;
  template <typename Visit>
  void each_entry(uint32_t table, uint64_t first, uint64_t last, uint64_t stride, const Visit& visit) const {
    if (listed_[table].is_kept) {
      each_listed(table, first, last, stride, visit);
    } else {
      each_place(table, first, last, stride, visit);
    }
  }
  Leaver leaver_of(uint32_t table, const Entry& entry, uint64_t position, int64_t now) const;
  std::vector<Stretch> stretches(const std::vector<Due>& dues) const;
  void mark_in_use(const std::vector<Due>& dues, const std::vector<SlotSpan>& in_use, bool is_in_use);
  void guess_bound(Due& due) const;
  static void keep_lowest(std::vector<Leaver>& leavers, uint64_t count);
  void evict_lowest(std::vector<Due>& dues, const std::vector<SlotSpan>& in_use);
  // Takes keys out of lists and index, and rows out of the store; each element is of one table.
  void remove_keys(std::vector<std::vector<Leaver>>& of_tables);
  template <typename Judge, typename Settle>
  void sweep(const std::vector<uint32_t>& tables, const Judge& judge, const Settle& settle);
  void move_time(uint64_t step, uint64_t seconds);
  void judge_time(uint32_t table, int64_t step, int64_t seconds, std::vector<uint32_t>* expiring,
                  std::vector<std::pair<uint32_t, uint32_t>>* halvings);
  void find_next_events();
  void evict_expired(const std::vector<uint32_t>& tables);
  void halve_counts(const std::vector<std::pair<uint32_t, uint32_t>>& halvings);
  RetentionNumbers numbers_of(uint32_t table) const;
  int64_t now_of(uint32_t table) const;
  int64_t step_of(uint32_t table) const;
  void mark_used(const uint32_t* slots, int64_t count, uint32_t table);

  // host_store_rows.cc
  void return_freed_slots();
  void content_changed();
  uint64_t most_in_order() const;
  bool is_in_order(uint32_t table) const;
  void order_for_export(uint32_t table);

  Status update(std::vector<LookupGradient>& gradients, const Hyper* hypers, uint64_t step, bool is_order_free, int64_t* rows);
  // host_store_gradients.cc
  Status measure(std::vector<LookupGradient>& gradients, double order, bool is_order_free, double* total);
  std::vector<Unit> update_units(const PoolingPlan& plan, const std::vector<LookupGradient>& gradients) const;
  // Returns how many there are; the vector may be longer.
  int64_t collect_occurrences(const std::vector<LookupGradient>& gradients, const Unit& unit,
                              std::vector<Occurrence>* occurrences) const;
  UpdateScratch update_scratch(size_t count, ThreadScratch& scratch) const;
  // Into values of the given type: the store's, or fp32.
  void copy_rows(const uint32_t* slots, int64_t count, ValueType type, void* values, float* state);
  uint64_t extent_rows() const;  // slots that a shard takes at a time
  uint32_t first_owner(uint32_t slot) const { return first_owners_[(slot - num_defaults_) / kLeastExtent]; }
  Status take_slot(uint32_t shard_number, uint32_t* slot);
  Status refresh(LookupGradient& gradient);
  std::vector<Tile> lookup_tiles(const PoolingPlan& plan, const PackedKeys& batch) const;
  bool commit_slots(uint64_t slots);
  Rows rows() const {
    return {values_.data(), reinterpret_cast<float*>(states_.data()), dim_, state_dim_, usage_dim_, type_, value_bytes_};
  }

  const uint32_t dim_;
  const ValueType type_;
  const uint32_t value_bytes_;
  const uint32_t state_dim_;
  const uint32_t usage_dim_;
  const uint64_t max_bytes_;
  const uint64_t scan_from_;
  const char* isa_ = "";
  const RowKernels kernels_;
  std::vector<Initializer> initializers_;
  std::vector<RetentionPolicy> policies_;
  std::vector<RetentionNumbers> retention_;
  std::vector<uint32_t> default_slots_;  // kNoSlot: the table refuses no key
  std::vector<std::atomic<uint64_t>> rows_of_table_;
  std::vector<uint64_t> candidates_of_table_;
  std::vector<Listed> listed_;
  std::vector<Threshold> row_thresholds_, candidate_thresholds_;  // of the call at hand; none is set between calls
  std::vector<uint32_t> number_of_table_;  // among those that a loop is about; kNoNumber between loops
  std::vector<uint64_t> in_use_bits_;  // by slot; clear between calls
  bool retains_ = false;  // some table has rules
  Growth growth_{30, kUnlimited};
  uint64_t step_ = 0;
  // The time that `advance` was told; a table goes by it or, where that is later, by its own.
  int64_t clock_step_ = 0;
  int64_t clock_seconds_ = 0;
  std::vector<uint8_t> follows_;  // by table; false: its numbers were set since the last `advance`
  int64_t next_step_ = 0;      // before both of these, `advance` has nothing to do in any table
  int64_t next_second_ = 0;
  std::vector<uint32_t> full_tables_;  // whose counts are halved at the next step

  const uint64_t number_;  // of all stores of the process
  mutable ForkSafeMutex call_;
  ThreadPool pool_;
  Index index_;
  Region values_;
  Region states_;
  std::mutex arena_growth_;
  uint64_t slots_handed_out_ = 0;
  uint64_t num_defaults_ = 0;  // slots of default rows, the first ones
  std::vector<uint32_t> free_slots_;  // for any shard
  std::vector<uint8_t> first_owners_;  // of each kLeastExtent slots behind the default rows: the shard that took them
  uint64_t content_version_ = 1;
  uint64_t erase_version_ = 1;
  ExportOrder export_order_;
  std::vector<ShardSlots> shards_;
  std::vector<ThreadScratch> scratch_;
  std::vector<Miss> sorted_misses_;
  std::vector<std::vector<Newcomer>> newcomers_ = std::vector<std::vector<Newcomer>>(kNumShards);
  std::vector<TileMisses> tile_misses_;
  std::shared_ptr<BufferPool> lookup_memory_;
};

}  // namespace penstock
