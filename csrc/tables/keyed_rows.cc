// Rows by key: made, grown and copied.
#include "tables/keyed_rows.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace penstock {

KeyedRows::KeyedRows(const RowLayout& row_layout, OptimizerKind optimizer, const std::vector<TableRules>& rules,
                     const StoreOptions& options)
    : layout(row_layout),
      kernels(select_row_kernels(layout.dim, layout.type, optimizer, options.most_isa, &isa)),
      tables(rules),
      pool(options.num_threads),
      // Marks of use take memory, so that less of it is left for the index.
      growth{layout.usage_dim != 0 ? 20u : 30u, tables.most_entries()},
      slots(layout, options.max_bytes, tables.num_defaults, options.num_threads) {}

bool KeyedRows::open() {
  if (!index.open() || !slots.open()) return false;
  for (uint32_t table = 0; table < tables.size(); ++table) {
    const uint32_t slot = tables.default_slots[table];
    if (slot == kNoSlot) continue;
    const std::vector<float> value(layout.dim, tables.policies[table].default_value);
    store_values(layout.type, value.data(), layout.dim, rows().value(slot));
    std::fill_n(rows().state(slot), layout.state_dim, tables.initializers[table].state);
  }
  return true;
}

Status KeyedRows::insert_by_shard(const std::function<Status(uint32_t, int)>& insert) {
  try {
    std::vector<Status> status(kNumShards);
    for (;;) {
      pool.run(kNumShards, [&](int64_t shard, int thread) { status[shard] = insert(static_cast<uint32_t>(shard), thread); });
      bool is_full = false;
      for (const Status s : status) {
        if (s != Status::kOk && s != Status::kIndexFull) return s;
        is_full |= s == Status::kIndexFull;
      }
      if (!is_full) return Status::kOk;
      if (!index.grow(pool, growth)) return Status::kOutOfMemory;
    }
  } catch (const std::bad_alloc&) {
    return Status::kNoWorkingMemory;
  }
}

void KeyedRows::copy(const uint32_t* slots_of_rows, int64_t count, ValueType type, void* values, float* state) {
  const size_t value_bytes = size_t{layout.dim} * bytes_of(type);
  pool.run((count + kChunkRows - 1) / kChunkRows, [&](int64_t chunk, int) {
    constexpr int64_t kAhead = 8;
    const Rows all = rows();
    const int64_t last = std::min((chunk + 1) * kChunkRows, count);
    for (int64_t i = chunk * kChunkRows; i < last; ++i) {
      const uint32_t slot = slots_of_rows[i];
      if (i + kAhead < last && slots_of_rows[i + kAhead] != kNoSlot) {
        __builtin_prefetch(all.value(slots_of_rows[i + kAhead]));
        __builtin_prefetch(all.state(slots_of_rows[i + kAhead]));
      }
      if (slot == kNoSlot) continue;
      void* const value = static_cast<char*>(values) + i * value_bytes;
      if (type == all.type) {
        std::memcpy(value, all.value(slot), value_bytes);
      } else {
        widen_values(all.type, all.value(slot), all.dim, static_cast<float*>(value));
      }
      std::memcpy(state + i * all.state_dim, all.state(slot), all.state_dim * sizeof(float));
    }
  });
}

}  // namespace penstock
