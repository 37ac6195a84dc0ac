// Finds the slots of keys, many at a time, and notes which have none.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "rows/row_kernels.h"
#include "tables/keyed_rows.h"

namespace penstock {

// A key without a row.
struct Miss {
  uint64_t key;
  uint32_t table;
  uint32_t* slot;  // where to write the answer
};

// Slots of one table that the call at hand has found, so that they stay.
struct SlotSpan {
  uint32_t table;
  const uint32_t* slots;
  int64_t count;
};

class KeyFinder {
 public:
  static constexpr int64_t kMinRun = 64;  // keys of one table that are worth a pass of their own; fewer go with those of others

  explicit KeyFinder(KeyedRows& rows) : rows_(rows), threads_(rows.pool.num_threads()) {}

  // Forgets misses, and keys that wait.
  void begin();
  // The keys without a row that a thread has come across, in their order.
  std::vector<Miss>& misses(int thread) { return threads_[thread].misses; }
  bool has_misses() const;
  int64_t num_misses() const;

  // Some keys may wait for those of others until the thread's are flushed.
  void find(const int64_t* keys, int64_t count, uint32_t table, uint32_t* slots, int thread);
  void flush(int thread);
  // Finds all keys of a tile of a batch.
  void find_tile(const PoolingPlan& plan, const PackedKeys& batch, const Tile& tile, uint32_t* slots, int thread);
  // Notes those of `keys` that have no slot.
  void note_misses(const uint64_t* keys, int64_t count, uint32_t table, uint32_t* slots, int thread);

 private:
  // Keys of short runs on their way to the find kernel.
  struct Chunk {
    static constexpr int64_t kCapacity = 1024;
    uint64_t keys[kCapacity];
    uint32_t tables[kCapacity];
    uint32_t slots[kCapacity];
    uint32_t* targets[kCapacity];
    int64_t count = 0;
  };
  struct alignas(64) Thread {
    std::vector<Miss> misses;
    std::unique_ptr<Chunk> chunk = std::make_unique<Chunk>();
  };

  KeyedRows& rows_;
  std::vector<Thread> threads_;
};

}  // namespace penstock
