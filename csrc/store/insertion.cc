// Misses by shard of the index: each shard is one thread's.
#include "store/insertion.h"

#include <utility>

#include "system/memory.h"

namespace penstock {

Status Insertion::insert_shard(uint32_t shard_number, const Miss* misses, int64_t count, int64_t* done) {
  constexpr int64_t kAhead = 8;
  const IndexView index = rows_.index.view();
  // Misses of one feature come one after the other: their table's rows are counted together.
  uint32_t table = 0;
  uint64_t rows_of_table = 0;
  const auto count_rows = [&] {
    if (rows_of_table != 0) rows_.tables.rows[table].fetch_add(rows_of_table, std::memory_order_relaxed);
    rows_of_table = 0;
  };
  for (int64_t& i = *done; i < count; ++i) {
    if (i + kAhead < count) {
      const uint64_t hash = rows_.index.hash(misses[i + kAhead].key, misses[i + kAhead].table);
      __builtin_prefetch(index.shard(hash) + index.home(hash), 1);
    }
    const Miss& miss = misses[i];
    const uint64_t hash = rows_.index.hash(miss.key, miss.table);
    if (const Entry* const entry = rows_.index.find(miss.key, miss.table, hash)) {
      *miss.slot = entry->slot();
      continue;
    }
    const Status status = rows_.index.is_full(shard_number) ? Status::kIndexFull : rows_.slots.take(shard_number, miss.slot);
    if (status != Status::kOk) {
      count_rows();
      return status;
    }
    rows_.initialize(miss.table, miss.key, *miss.slot);
    rows_.index.insert(miss.key, Entry::pack(miss.table, *miss.slot), hash);
    if (miss.table != table) count_rows();
    table = miss.table;
    ++rows_of_table;
  }
  count_rows();
  return Status::kOk;
}

SortedMisses Insertion::sort_misses() {
  const auto shard_of = [this](const Miss& miss) { return Index::shard_of(rows_.index.hash(miss.key, miss.table)); };
  // Counting sort by shard; each thread's misses stay in their order.
  const int64_t threads = rows_.pool.num_threads();
  std::vector<int64_t> begin(kNumShards * threads + 1);
  rows_.pool.run(threads, [&](int64_t t, int) {
    for (const Miss& miss : finder_.misses(static_cast<int>(t))) ++begin[shard_of(miss) * threads + t + 1];
  });
  for (size_t i = 1; i < begin.size(); ++i) begin[i] += begin[i - 1];
  ensure_size(sorted_, static_cast<size_t>(begin.back()));
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  rows_.pool.run(threads, [&](int64_t t, int) {
    for (const Miss& miss : finder_.misses(static_cast<int>(t))) sorted_[next[shard_of(miss) * threads + t]++] = miss;
  });
  std::vector<int64_t> of_shard(kNumShards + 1);
  for (uint32_t shard = 0; shard <= kNumShards; ++shard) of_shard[shard] = begin[shard * threads];
  return {sorted_.data(), std::move(of_shard)};
}

Status Insertion::insert(bool admits_all, const std::vector<SlotSpan>& in_use) {
  rows_.order.keys_changed();
  const SortedMisses misses = sort_misses();
  if (rows_.tables.retains) return admission_.admit(misses, admits_all, in_use);
  std::vector<int64_t> done(kNumShards);
  return rows_.insert_by_shard([&](uint32_t shard, int) {
    const int64_t first = misses.begin[shard];
    return insert_shard(shard, misses.all + first, misses.begin[shard + 1] - first, &done[shard]);
  });
}

}  // namespace penstock
