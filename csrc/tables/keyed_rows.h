// The rows of a store by key: the index, the slots, and what new rows begin with. Who gets a row is not decided here.
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

#include "index/index.h"
#include "rows/row_kernels.h"
#include "system/thread_pool.h"
#include "tables/export_order.h"
#include "tables/slot_pool.h"
#include "tables/status.h"
#include "tables/tables.h"

namespace penstock {

struct StoreOptions {
  int num_threads;
  uint64_t max_bytes;         // bounds the arenas' address range; 0: twice the machine's memory
  std::string_view most_isa;  // no kernels above this instruction set; empty: the best
  uint64_t scan_from;  // places of an index that may be passed over, in place of a list, to look through a table that is much of it
};

struct KeyedRows {
  KeyedRows(const RowLayout& row_layout, OptimizerKind optimizer, const std::vector<TableRules>& rules,
            const StoreOptions& options);

  // Makes the default rows. False: no memory or address space.
  bool open();

  Rows rows() const { return slots.rows(); }
  const Entry* entries() const { return index.view().entries; }
  uint64_t num_places() const { return index.capacity() * kNumShards; }

  // Calls insert(shard, thread) for every shard; again for all after the index had to grow for one. No exception leaves it:
  // what has been inserted is for the caller to note.
  Status insert_by_shard(const std::function<Status(uint32_t, int)>& insert);
  void initialize(uint32_t table, uint64_t key, uint32_t slot) {
    kernels.initialize(rows(), tables.initializers[table], key, rows().value(slot), rows().state(slot));
  }
  // Into values of the given type: the store's, or fp32. Those without a slot are left alone.
  void copy(const uint32_t* slots_of_rows, int64_t count, ValueType type, void* values, float* state);
  // Gives the slots of erased rows back.
  void give_back() {
    slots.give_back();
    order.keys_changed();
  }

  const RowLayout layout;
  const char* isa = "";
  const RowKernels kernels;
  Tables tables;
  ThreadPool pool;
  Index index;
  const Growth growth;
  SlotPool slots;
  ExportOrder order;
};

constexpr int64_t kChunkRows = 4096;  // of one task

}  // namespace penstock
