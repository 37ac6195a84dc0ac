// The verbs that name rows one by one: find, insert, erase, export; and what a store says of itself.
#include "host_store.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace penstock {
namespace {

constexpr int64_t kChunkKeys = 4096;  // keys of one task

}  // namespace

Status HostStore::locate(uint32_t table, const int64_t* keys, int64_t count, bool insert,
                         std::vector<uint32_t>* slots) {
  slots->resize(static_cast<size_t>(count));
  for (ThreadScratch& scratch : scratch_) scratch.misses.clear();
  pool_.run((count + kChunkKeys - 1) / kChunkKeys, [&](int64_t chunk, int thread) {
    ThreadScratch& scratch = scratch_[thread];
    const int64_t first = chunk * kChunkKeys;
    find_keys(keys + first, std::min(kChunkKeys, count - first), table, slots->data() + first, scratch);
    flush(scratch);
  });
  if (!insert) return Status::kOk;
  for (const ThreadScratch& scratch : scratch_) {
    if (!scratch.misses.empty()) return insert_misses();
  }
  return Status::kOk;
}

void HostStore::copy_rows(const uint32_t* slots, int64_t count, float* values, float* state) {
  pool_.run((count + kChunkKeys - 1) / kChunkKeys, [&](int64_t chunk, int) {
    constexpr int64_t kAhead = 8;
    const Rows all = rows();
    const int64_t last = std::min((chunk + 1) * kChunkKeys, count);
    for (int64_t i = chunk * kChunkKeys; i < last; ++i) {
      if (i + kAhead < last && slots[i + kAhead] != kNoSlot) {
        __builtin_prefetch(all.value(slots[i + kAhead]));
        __builtin_prefetch(all.state(slots[i + kAhead]));
      }
      if (slots[i] == kNoSlot) continue;
      std::memcpy(values + i * dim_, all.value(slots[i]), dim_ * sizeof(float));
      std::memcpy(state + i * state_dim_, all.state(slots[i]), state_dim_ * sizeof(float));
    }
  });
}

Status HostStore::find(uint32_t table, const int64_t* keys, int64_t count, bool insert, float* values, float* state,
                       bool* found) {
  const std::lock_guard<std::mutex> guard(call_);
  std::vector<uint32_t> slots;
  Status status = locate(table, keys, count, false, &slots);
  for (int64_t i = 0; i < count; ++i) found[i] = slots[i] != kNoSlot;
  if (insert) status = locate(table, keys, count, true, &slots);
  if (status != Status::kOk) return status;
  copy_rows(slots.data(), count, values, state);
  for (int64_t i = 0; i < count; ++i) {
    if (slots[i] != kNoSlot) continue;
    kernels_.initialize(rows(), initializers_[table], static_cast<uint64_t>(keys[i]), values + i * dim_,
                        state + i * state_dim_);
  }
  return Status::kOk;
}

Status HostStore::insert_or_assign(uint32_t table, const int64_t* keys, int64_t count, const float* values,
                                   const float* state, int64_t* inserted) {
  const std::lock_guard<std::mutex> guard(call_);
  const uint64_t before = num_rows(table);
  std::vector<uint32_t> slots;
  const Status status = locate(table, keys, count, true, &slots);
  *inserted = static_cast<int64_t>(num_rows(table) - before);
  if (status != Status::kOk) return status;
  // A thread owns the slots of its residue, so that of equal keys the last one stays.
  const uint32_t owners = static_cast<uint32_t>(num_threads());
  pool_.run(owners, [&](int64_t owner, int) {
    for (int64_t i = 0; i < count; ++i) {
      if (slots[i] % owners != static_cast<uint32_t>(owner)) continue;
      std::memcpy(rows().value(slots[i]), values + i * dim_, dim_ * sizeof(float));
      std::memcpy(rows().state(slots[i]), state + i * state_dim_, state_dim_ * sizeof(float));
    }
  });
  return Status::kOk;
}

int64_t HostStore::erase(uint32_t table, const int64_t* keys, int64_t count) {
  const std::lock_guard<std::mutex> guard(call_);
  ++erase_version_;
  ++content_version_;
  std::atomic<int64_t> erased{0};
  // A thread owns the shards of its residue.
  const uint32_t owners = static_cast<uint32_t>(num_threads());
  pool_.run(owners, [&](int64_t owner, int) {
    int64_t mine = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t hash = index_.hash(static_cast<uint64_t>(keys[i]), table);
      const uint32_t shard = Index::shard_of(hash);
      if (shard % owners != static_cast<uint32_t>(owner)) continue;
      const uint32_t slot = index_.erase(static_cast<uint64_t>(keys[i]), table, hash);
      if (slot == kNoSlot) continue;
      shards_[shard].free.push_back(slot);
      --shards_[shard].rows_of_table[table];
      ++mine;
    }
    erased += mine;
  });
  return erased;
}

Status HostStore::export_batch(uint32_t table, uint64_t* cursor, uint64_t version, int64_t max_rows, int64_t* keys,
                               float* values, float* state, int64_t* num_rows) {
  const std::lock_guard<std::mutex> guard(call_);
  if (version != content_version_) return Status::kStaleCursor;
  const Entry* const entries = index_.view().entries;
  const uint64_t end = index_.capacity() * kNumShards;
  std::vector<uint32_t> slots;
  slots.reserve(static_cast<size_t>(max_rows));
  for (; *cursor < end && static_cast<int64_t>(slots.size()) < max_rows; ++*cursor) {
    const Entry& entry = entries[*cursor];
    if (entry.table() != table || entry.is_empty()) continue;
    keys[slots.size()] = static_cast<int64_t>(entry.key);
    slots.push_back(entry.slot());
  }
  *num_rows = static_cast<int64_t>(slots.size());
  copy_rows(slots.data(), *num_rows, values, state);
  return Status::kOk;
}

uint64_t HostStore::num_rows(uint32_t table) const {
  uint64_t rows = 0;
  for (const ShardSlots& shard : shards_) rows += shard.rows_of_table[table];
  return rows;
}

StoreMemory HostStore::memory() const {
  StoreMemory memory{0, 0, slots_handed_out_, index_.memory_bytes(), slots_handed_out_ * (dim_ + state_dim_) * sizeof(float)};
  for (uint32_t shard = 0; shard < kNumShards; ++shard) {
    memory.rows += index_.count(shard);
    memory.free_slots += shards_[shard].free.size() + (shards_[shard].end - shards_[shard].next);
  }
  return memory;
}

std::string HostStore::check_invariants() const {
  const std::lock_guard<std::mutex> guard(call_);
  if (!index_.is_consistent()) return "an index entry cannot be reached from its home, or counts differ";
  std::vector<uint8_t> uses(slots_handed_out_);
  std::vector<uint64_t> rows_of_table(initializers_.size());
  const Entry* const entries = index_.view().entries;
  for (uint64_t i = 0; i < index_.capacity() * kNumShards; ++i) {
    if (entries[i].is_empty()) continue;
    if (entries[i].slot() >= uses.size()) return "an index entry names a slot that was never handed out";
    if (entries[i].table() >= rows_of_table.size()) return "an index entry names an unknown table";
    ++uses[entries[i].slot()];
    ++rows_of_table[entries[i].table()];
  }
  for (const ShardSlots& shard : shards_) {
    for (const uint32_t slot : shard.free) ++uses[slot];
    for (uint32_t slot = shard.next; slot < shard.end; ++slot) ++uses[slot];
  }
  if (std::any_of(uses.begin(), uses.end(), [](uint8_t n) { return n != 1; })) {
    return "a slot is used twice or lost: rows + free slots != slots handed out";
  }
  for (uint32_t table = 0; table < rows_of_table.size(); ++table) {
    if (rows_of_table[table] != num_rows(table)) return "the row count of a table is wrong";
  }
  return "";
}

}  // namespace penstock
