// Rows by (table, key) in this machine's memory: an index and two arenas (values, optimizer states), for all tables of
// one row layout.
//
// Calls may come from any thread, one at a time (a lock sees to it); inside a call the work is split over the pool's
// threads: rows and index shards have one owner each, so there are no locks on the way.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "index.h"
#include "memory.h"
#include "retention.h"
#include "row_kernels.h"
#include "thread_pool.h"

namespace penstock {

enum class Status {
  kOk,
  kOutOfMemory,   // the system gave no memory; what was done before stays done
  kTooManyRows,   // 2^32 - 1 rows in one store
  kStaleCursor,   // the store changed while it was exported
  kBadOffsets,    // offsets do not rise from 0 to the number of keys
  kBadWeights,    // a weight is not finite
  kBagTooLong,    // a sequence has fewer positions than a bag has keys
  kIndexFull,     // internal: grow the index and go on
  kOverBudget,    // a table holds fewer rows than it was told to take
};

// What apply_gradients needs of a look-up: where each key's row is.
struct Lookup {
  std::vector<uint32_t> slots;  // [N] by position in the packed keys; only the plan's features are filled
  uint64_t erase_version = 0;  // slots hold as long as no row was erased since
  bool is_one_hot = false;
  int64_t num_missing = 0;  // keys read without a row (insert == false)
};

struct LookupGradient {
  Lookup* lookup;
  PackedKeys batch;
  const float* grad;  // [B, plan.stride]
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
  HostStore(uint32_t dim, ValueType type, uint32_t state_dim, uint32_t usage_dim, OptimizerKind optimizer,
            const std::vector<TableRules>& tables, int num_threads, uint64_t max_bytes,
            std::string_view most_isa);

  // False: no memory or address space.
  bool open();

  // Pools the batch into out [B, plan.stride]. With `insert`, absent keys get rows, where admitted; without, they read as
  // initial values or the default row.
  Status pooled_lookup(const PoolingPlan& plan, PackedKeys batch, bool insert, float* out, Lookup* lookup);

  // One optimizer step on every row that the look-ups touched, on the sum of its gradients; rows: how many. With
  // is_order_free the bits do not depend on the order of the samples either.
  // Values of two bytes are rounded by the number of the step.
  Status apply_gradients(const PoolingPlan& plan, std::vector<LookupGradient>& gradients, const Hyper* hypers,
                         uint64_t step, bool is_order_free, int64_t* rows);

  // values [n, dim] and state [n, state_dim]; absent keys read as initial or as the default row. found[i]: the row was there
  // before the call.
  Status find(uint32_t table, const int64_t* keys, int64_t count, bool insert, float* values, float* state,
              bool* found);

  // Writes rows, admitting every key; of equal keys the last one stays. inserted: rows that were new. The values' type is
  // the store's, or fp32, which is rounded to nearest. usage [n, usage_dim]; null: used now, never before.
  Status insert_or_assign(uint32_t table, const int64_t* keys, int64_t count, ValueType type, const void* values,
                          const float* state, const int64_t* usage, int64_t* inserted);

  int64_t erase(uint32_t table, const int64_t* keys, int64_t count);

  // Copies up to max_rows rows of a table from *cursor on (0 at first) and moves it; ends when it returns 0 rows.
  // Values come in the store's type. kStaleCursor: content_version() is not `version` any more.
  Status export_batch(uint32_t table, uint64_t* cursor, uint64_t version, int64_t max_rows, int64_t* keys,
                      void* values, float* state, int64_t* usage, int64_t* rows);

  // The same for keys that are counted but have no row.
  Status export_candidates(uint32_t table, uint64_t* cursor, uint64_t version, int64_t max_keys, int64_t* keys,
                           int64_t* counts, int64_t* exported);
  Status import_candidates(uint32_t table, const int64_t* keys, const int64_t* counts, int64_t count);
  uint64_t num_candidates(uint32_t table) const { return candidates_of_table_[table]; }

  // Moves the time on. Rows beyond their ttl leave, counts are halved.
  void advance(uint64_t step, uint64_t seconds);

  // What a table remembers besides; value [dim] and state [state_dim] of its default row.
  RetentionNumbers retention(uint32_t table, float* value, float* state) const;
  void set_retention(uint32_t table, const RetentionNumbers& numbers, const float* value, const float* state);

  // Rises with every call that adds or removes rows.
  uint64_t content_version() const { return content_version_; }

  uint64_t num_rows(uint32_t table) const;

  // Where the table's rows are, in the order of the index: slots [num_rows].
  void row_slots(uint32_t table, uint32_t* slots) const;
  StoreMemory memory() const;
  uint64_t longest_probe() const { return index_.longest_probe(); }
  const char* isa() const { return isa_; }
  ValueType type() const { return type_; }
  int num_threads() const { return pool_.num_threads(); }

  // Empty, or what is wrong: every entry reachable, slots used once, rows + free slots = slots handed out.
  std::string check_invariants() const;

 private:
  struct Miss {
    uint64_t key;
    uint32_t table;
    uint32_t* slot;  // where to write the answer
  };
  static constexpr uint64_t kLeastExtent = 16;  // slots; all extents are multiples of it
  struct alignas(64) ShardSlots {
    std::vector<uint32_t> free;
    uint32_t next = 0;
    uint32_t end = 0;  // [next, end) is this shard's current extent
    std::vector<uint64_t> rows_of_table;
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
  };
  // What the newcomers of one call amount to, of one table.
  struct Tally {
    int64_t wanted = 0;
    int64_t uncounted = 0;
    int64_t admitted = 0;
    int64_t refused = 0;
    int64_t candidates = 0;  // change of their number
    int64_t evicted = 0;
    int64_t evicted_age = 0;
  };
  // Who comes in where there is not room for all: those whose precedence is below.
  struct Thresholds {
    std::vector<uint64_t> row;
    std::vector<uint64_t> candidate;
  };
  // A row that may leave.
  struct Leaver {
    uint64_t rank;
    uint64_t key;
    uint32_t table;
    uint32_t age;
  };
  // Slots that the call at hand has found, so that they stay.
  struct SlotSpan {
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
    std::vector<Tally> tally;  // by table
    std::vector<uint32_t> freed;
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

  // host_store_lookup.cc
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
  Status locate(uint32_t table, const int64_t* keys, int64_t count, Insert insert, std::vector<uint32_t>* slots);
  std::vector<int64_t> sort_misses();
  // Gives rows to the keys that were not found. in_use: slots that must not be evicted for them.
  Status insert_misses(Insert insert, const std::vector<SlotSpan>& in_use);
  Status insert_shard(uint32_t shard, const Miss* misses, int64_t count, int64_t* done);
  // Calls insert(shard, thread) for every shard; again for all after the index had to grow for one.
  Status insert_by_shard(const std::function<Status(uint32_t, int)>& insert);

  // host_store_retention.cc
  Status admit_misses(const std::vector<int64_t>& begin, bool admits_all, const std::vector<SlotSpan>& in_use);
  void judge_shard(uint32_t shard, int64_t first, int64_t last, bool admits_all, std::vector<Tally>& tally);
  Thresholds make_room(const std::vector<Tally>& totals, const std::vector<SlotSpan>& in_use);
  uint64_t threshold(uint32_t table, bool of_rows, uint64_t room) const;
  Status admit_shard(uint32_t shard, const Thresholds& thresholds, bool admits_all, std::vector<Tally>& tally,
                     int64_t* done);
  Status give_row(uint32_t shard, const Newcomer& newcomer, Entry* entry, uint64_t hash, uint32_t* slot);
  void clear_tallies();
  std::vector<Tally> total_tally() const;
  void evict_lowest(uint32_t table, uint64_t count, const std::vector<SlotSpan>& in_use);
  template <typename Leaves>
  void collect_leavers(uint32_t shard, const std::vector<uint8_t>& tables, const Leaves& leaves, std::vector<Leaver>* leavers);
  void erase_rows(uint32_t shard, const std::vector<Leaver>& leavers, std::vector<uint32_t>* freed);
  void count_evicted(const std::vector<Leaver>& leavers, std::vector<Tally>& tally) const;
  void end_eviction();
  void evict_expired(const std::vector<uint8_t>& tables);
  void halve_counts(const std::vector<uint8_t>& halvings);
  uint64_t rank_of(uint32_t table, uint32_t slot) const;
  void mark_used(const uint32_t* slots, int64_t count, uint32_t table);
  void return_freed_slots();

  std::vector<Unit> update_units(const PoolingPlan& plan, const std::vector<LookupGradient>& gradients) const;
  // Returns how many there are; the vector may be longer.
  int64_t collect_occurrences(const PoolingPlan& plan, const std::vector<LookupGradient>& gradients, const Unit& unit,
                              std::vector<Occurrence>* occurrences) const;
  UpdateScratch update_scratch(size_t count, ThreadScratch& scratch) const;
  bool classify(PackedKeys* batch);
  bool has_finite_weights(const PackedKeys& batch);
  // Into values of the given type: the store's, or fp32.
  void copy_rows(const uint32_t* slots, int64_t count, ValueType type, void* values, float* state);
  uint64_t extent_rows() const;  // slots that a shard takes at a time
  uint32_t first_owner(uint32_t slot) const { return first_owners_[(slot - num_defaults_) / kLeastExtent]; }
  Status take_slot(uint32_t shard_number, uint32_t* slot);
  Status refresh(const PoolingPlan& plan, LookupGradient& gradient);
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
  const char* isa_ = "";
  const RowKernels kernels_;
  std::vector<Initializer> initializers_;
  std::vector<RetentionPolicy> policies_;
  std::vector<RetentionNumbers> retention_;
  std::vector<uint32_t> default_slots_;  // kNoSlot: the table refuses no key
  std::vector<uint64_t> candidates_of_table_;
  bool retains_ = false;  // some table has rules
  Growth growth_{30, kUnlimited};
  uint64_t step_ = 0;

  mutable std::mutex call_;
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
  std::vector<ShardSlots> shards_;
  std::vector<ThreadScratch> scratch_;
  std::vector<Miss> sorted_misses_;
  std::vector<std::vector<Newcomer>> newcomers_ = std::vector<std::vector<Newcomer>>(kNumShards);
  std::vector<TileMisses> tile_misses_;
};

}  // namespace penstock
