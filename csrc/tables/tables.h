// What a store keeps of each of its tables, by number: settings, counters, and how many rows there are.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "index/hashing.h"
#include "index/index.h"
#include "tables/retention.h"

namespace penstock {

// A table as the store is given it.
struct TableRules {
  Initializer initializer;
  RetentionPolicy retention;
};

struct Tables {
  explicit Tables(const std::vector<TableRules>& rules);

  size_t size() const { return policies.size(); }
  uint64_t num_rows(uint32_t table) const { return rows[table].load(std::memory_order_relaxed); }
  // The most entries that an index of them all can have.
  uint64_t most_entries() const;
  // Counts rows and candidates again, as the index has them.
  void recount(const Entry* entries, uint64_t places) noexcept;

  std::vector<Initializer> initializers;
  std::vector<RetentionPolicy> policies;
  std::vector<RetentionNumbers> numbers;
  std::vector<uint32_t> default_slots;  // kNoSlot: the table refuses no key
  std::vector<std::atomic<uint64_t>> rows;
  std::vector<uint64_t> candidates;  // keys that are counted but have no row
  uint32_t num_defaults = 0;         // slots of default rows, the first ones
  bool retains = false;              // some table has rules
};

}  // namespace penstock
