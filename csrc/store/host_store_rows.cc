// The verbs that name rows one by one: find, insert, erase, export; and what a store says of itself.
#include "store/host_store.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <numeric>
#include <set>

namespace penstock {
namespace {

constexpr int64_t kChunkKeys = 4096;  // keys of one task
constexpr uint64_t kMostInOrder = 1 << 21;  // rows whose places are kept for an export; of a large index a 16th of its entries

}  // namespace

Status HostStore::locate(uint32_t table, const int64_t* keys, int64_t count, Insert insert,
                         std::vector<uint32_t>* slots) {
  slots->resize(static_cast<size_t>(count));
  for (ThreadScratch& scratch : scratch_) scratch.misses.clear();
  pool_.run((count + kChunkKeys - 1) / kChunkKeys, [&](int64_t chunk, int thread) {
    ThreadScratch& scratch = scratch_[thread];
    const int64_t first = chunk * kChunkKeys;
    find_keys(keys + first, std::min(kChunkKeys, count - first), table, slots->data() + first, scratch);
    flush(scratch);
  });
  if (insert == Insert::kNever) return Status::kOk;
  for (const ThreadScratch& scratch : scratch_) {
    if (!scratch.misses.empty()) return insert_misses(insert, {{table, slots->data(), count}});
  }
  return Status::kOk;
}

void HostStore::copy_rows(const uint32_t* slots, int64_t count, ValueType type, void* values, float* state) {
  const size_t value_bytes = size_t{dim_} * bytes_of(type);
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
      void* const value = static_cast<char*>(values) + i * value_bytes;
      if (type == type_) {
        std::memcpy(value, all.value(slots[i]), value_bytes);
      } else {
        widen_values(type_, all.value(slots[i]), dim_, static_cast<float*>(value));
      }
      std::memcpy(state + i * state_dim_, all.state(slots[i]), state_dim_ * sizeof(float));
    }
  });
}

Status HostStore::find(uint32_t table, const int64_t* keys, int64_t count, bool insert, float* values, float* state,
                       bool* found) {
  return call([&] { return read(table, keys, count, insert, values, state, found); });
}

Status HostStore::read(uint32_t table, const int64_t* keys, int64_t count, bool insert, float* values, float* state,
                       bool* found) {
  std::vector<uint32_t> slots;
  Status status = locate(table, keys, count, Insert::kNever, &slots);
  for (int64_t i = 0; i < count; ++i) found[i] = slots[i] != kNoSlot;
  if (insert) status = locate(table, keys, count, Insert::kAdmitted, &slots);
  if (status != Status::kOk) return status;
  for (int64_t i = 0; i < count; ++i) {
    if (slots[i] == kNoSlot) slots[i] = default_slots_[table];
  }
  copy_rows(slots.data(), count, ValueType::kFloat32, values, state);
  std::vector<char> initial(value_bytes_);
  for (int64_t i = 0; i < count; ++i) {
    if (slots[i] != kNoSlot) continue;
    kernels_.initialize(rows(), initializers_[table], static_cast<uint64_t>(keys[i]), initial.data(),
                        state + i * state_dim_);
    widen_values(type_, initial.data(), dim_, values + i * dim_);
  }
  return Status::kOk;
}

Status HostStore::insert_or_assign(uint32_t table, const int64_t* keys, int64_t count, ValueType type, const void* values,
                                   const float* state, const int64_t* usage, int64_t* inserted) {
  return call([&] { return assign(table, keys, count, type, values, state, usage, inserted); });
}

Status HostStore::assign(uint32_t table, const int64_t* keys, int64_t count, ValueType type, const void* values,
                         const float* state, const int64_t* usage, int64_t* inserted) {
  const uint64_t before = num_rows(table);
  std::vector<uint32_t> slots;
  const int64_t evicted = retention_[table].evicted;
  const Status status = locate(table, keys, count, Insert::kAll, &slots);
  *inserted = static_cast<int64_t>(num_rows(table) - before) + retention_[table].evicted - evicted;
  if (status != Status::kOk && status != Status::kOverBudget) return status;
  ++content_version_;  // though no row may have come or gone
  const int64_t now = now_of(table);
  if (usage != nullptr && usage_dim_ != 0) {
    for (int64_t i = 0; i < count; ++i) retention_[table].ahead += slots[i] != kNoSlot && usage[i * usage_dim_] > now;
  }
  // A thread owns the slots of its residue, so that of equal keys the last one stays.
  const uint32_t owners = static_cast<uint32_t>(num_threads());
  pool_.run(owners, [&](int64_t owner, int) {
    for (int64_t i = 0; i < count; ++i) {
      if (slots[i] % owners != static_cast<uint32_t>(owner) || slots[i] == kNoSlot) continue;
      if (type == type_) {
        std::memcpy(rows().value(slots[i]), static_cast<const char*>(values) + i * size_t{value_bytes_}, value_bytes_);
      } else {
        store_values(type_, static_cast<const float*>(values) + i * dim_, dim_, rows().value(slots[i]));
      }
      std::memcpy(rows().state(slots[i]), state + i * state_dim_, state_dim_ * sizeof(float));
      uint32_t* const marks = rows().usage(slots[i]);
      for (uint32_t word = 0; word < usage_dim_; ++word) {
        const int64_t unused = word == 0 ? now : 0;
        const int64_t given = usage != nullptr ? usage[i * usage_dim_ + word] : unused;
        marks[word] = static_cast<uint32_t>(word == 0 ? std::min(given, now) : given);
      }
    }
  });
  return status;
}

Status HostStore::erase(uint32_t table, const int64_t* keys, int64_t count, int64_t* erased) {
  return call([&] {
    // A thread owns the shards of its residue.
    const uint32_t owners = static_cast<uint32_t>(num_threads());
    std::vector<Status> status(owners);
    std::vector<int64_t> number(owners);
    const auto erase_owned = [&](int64_t owner) {
      for (int64_t i = 0; i < count; ++i) {
        const uint64_t key = static_cast<uint64_t>(keys[i]), hash = index_.hash(key, table);
        const uint32_t shard = Index::shard_of(hash);
        if (shard % owners != static_cast<uint32_t>(owner)) continue;
        Entry* const entry = index_.find(key, table, hash);
        if (entry == nullptr || entry->is_candidate()) continue;
        scratch_[owner].freed.push_back(entry->slot());
        index_.erase(entry);
        ++number[owner];
      }
    };
    pool_.run(owners, [&](int64_t owner, int) {
      try {
        erase_owned(owner);
      } catch (const std::bad_alloc&) {
        status[owner] = Status::kNoWorkingMemory;
      }
    });
    // Of all that were erased, if not all there are: what is noted below must fit the index.
    *erased = std::accumulate(number.begin(), number.end(), int64_t{0});
    rows_of_table_[table] -= static_cast<uint64_t>(*erased);
    if (policies_[table].evicts && listed_[table].is_kept && *erased != 0) {
      listed_[table].dead += static_cast<uint64_t>(*erased);
      listed_[table].repeats = true;
      tidy_if_worthwhile(table);
    }
    return_freed_slots();
    const auto short_one = std::find(status.begin(), status.end(), Status::kNoWorkingMemory);
    return short_one == status.end() ? Status::kOk : *short_one;
  });
}

// After rows were erased. Their slots go back to the shards that took them first, so that the rows of a shard lie together
// whatever comes and goes: in random places a look-up takes twice the time, for misses of address translation. What a shard
// has far more of than the others is for whoever needs it.
void HostStore::return_freed_slots() {
  ++erase_version_;
  content_changed();
  std::vector<uint32_t> counts(kNumShards);
  for (const ThreadScratch& scratch : scratch_) {
    for (const uint32_t slot : scratch.freed) ++counts[first_owner(slot)];
  }
  for (uint32_t number = 0; number < kNumShards; ++number) {
    // Not doubled, as a vector would: after a sweep of half a table these lists are a few per cent of its budget.
    std::vector<uint32_t>& free = shards_[number].free;
    const size_t needed = free.size() + counts[number];
    if (needed > free.capacity()) free.reserve(std::max(needed, free.capacity() + free.capacity() / 8));
  }
  for (ThreadScratch& scratch : scratch_) {
    for (const uint32_t slot : scratch.freed) shards_[first_owner(slot)].free.push_back(slot);
    std::vector<uint32_t>().swap(scratch.freed);  // a sweep of half a large table would otherwise stay resident
  }
  size_t free = 0;
  for (const ShardSlots& shard : shards_) free += shard.free.size();
  const size_t most = free / kNumShards * 5 / 4 + extent_rows();
  for (ShardSlots& shard : shards_) {
    if (shard.free.size() <= most) continue;
    free_slots_.insert(free_slots_.end(), shard.free.begin() + static_cast<int64_t>(most), shard.free.end());
    shard.free.resize(most);
  }
}

// Whenever rows or counts come or go.
void HostStore::content_changed() {
  ++content_version_;
  export_order_ = {};
}

uint64_t HostStore::most_in_order() const { return std::max(kMostInOrder, index_.capacity() * kNumShards / 16); }

bool HostStore::is_in_order(uint32_t table) const {
  const uint64_t tables = policies_.size();
  return (table + tables - export_order_.first) % tables + 1 < export_order_.begin.size();
}

// Finds the places of this table's rows and, as long as they are not too many, of those after it, in one pass.
void HostStore::order_for_export(uint32_t table) {
  const uint32_t tables = static_cast<uint32_t>(policies_.size());
  ExportOrder order{table, {0}, {}};
  for (uint32_t number = 0; number < tables; ++number) {
    const uint64_t end = order.begin.back() + num_rows((table + number) % tables);
    if (end > most_in_order()) break;
    order.begin.push_back(end);
  }
  order.places.resize(order.begin.back());
  std::vector<uint64_t> next(order.begin.begin(), order.begin.end() - 1);
  const Entry* const entries = index_.view().entries;
  for (uint64_t place = 0; place < index_.capacity() * kNumShards; ++place) {
    const Entry& entry = entries[place];
    if (entry.slot() == kNoSlot) continue;
    const uint32_t number = entry.table() >= table ? entry.table() - table : entry.table() + tables - table;
    if (number < next.size()) order.places[next[number]++] = place;
  }
  export_order_ = std::move(order);
}

Status HostStore::export_batch(uint32_t table, uint64_t* cursor, uint64_t version, int64_t max_rows, int64_t* keys,
                               void* values, float* state, int64_t* usage, int64_t* num_rows) {
  return call([&] { return copy_batch(table, cursor, version, max_rows, keys, values, state, usage, num_rows); });
}

Status HostStore::copy_batch(uint32_t table, uint64_t* cursor, uint64_t version, int64_t max_rows, int64_t* keys,
                             void* values, float* state, int64_t* usage, int64_t* num_rows) {
  if (version != content_version_) return Status::kStaleCursor;
  const Entry* const entries = index_.view().entries;
  const uint64_t end = index_.capacity() * kNumShards, most = std::min(static_cast<uint64_t>(max_rows), this->num_rows(table));
  std::vector<uint32_t> slots;
  slots.reserve(most);
  const auto copy_key = [&](const Entry& entry) {
    keys[slots.size()] = static_cast<int64_t>(entry.key);
    slots.push_back(entry.slot());
  };
  if (this->num_rows(table) <= most_in_order()) {
    constexpr uint64_t kAhead = 16;
    if (!is_in_order(table)) order_for_export(table);
    const uint64_t number = (table + policies_.size() - export_order_.first) % policies_.size();
    const uint64_t* const last = export_order_.places.data() + export_order_.begin[number + 1];
    const uint64_t* place = std::lower_bound(last - (export_order_.begin[number + 1] - export_order_.begin[number]), last, *cursor);
    for (; place != last && slots.size() < most; ++place) {
      if (kAhead < static_cast<uint64_t>(last - place)) __builtin_prefetch(entries + place[kAhead]);
      copy_key(entries[*place]);
    }
    *cursor = place == last ? end : *place;
  }
  for (; *cursor < end && slots.size() < most; ++*cursor) {
    const Entry& entry = entries[*cursor];
    if (entry.table() == table && entry.slot() != kNoSlot) copy_key(entry);
  }
  if (*cursor >= end) *cursor = kExported;
  *num_rows = static_cast<int64_t>(slots.size());
  copy_rows(slots.data(), *num_rows, type_, values, state);
  for (int64_t i = 0; i < *num_rows; ++i) {
    for (uint32_t word = 0; word < usage_dim_; ++word) usage[i * usage_dim_ + word] = rows().usage(slots[i])[word];
  }
  return Status::kOk;
}

bool HostStore::row_slots(uint32_t table, uint32_t* slots, size_t count) const {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  if (count != num_rows(table)) return false;
  const Entry* const entries = index_.view().entries;
  for (uint64_t i = 0; i < index_.capacity() * kNumShards; ++i) {
    if (entries[i].table() == table && entries[i].slot() != kNoSlot) *slots++ = entries[i].slot();
  }
  return true;
}

uint64_t HostStore::content_version() const {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  return content_version_;
}

uint64_t HostStore::longest_probe() const {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  return index_.longest_probe();
}

uint64_t HostStore::num_candidates(uint32_t table) const {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  return candidates_of_table_[table];
}

StoreMemory HostStore::memory() const {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  const uint64_t slots = slots_handed_out_ - num_defaults_;
  const uint64_t row_bytes = value_bytes_ + (state_dim_ + usage_dim_) * sizeof(float);
  StoreMemory memory{0, free_slots_.size(), slots, index_.memory_bytes(), slots * row_bytes};
  for (const std::atomic<uint64_t>& rows : rows_of_table_) memory.rows += rows.load(std::memory_order_relaxed);
  for (const Listed& listed : listed_) memory.index_bytes += listed.keys.memory_bytes();
  for (const ShardSlots& shard : shards_) {
    memory.free_slots += shard.free.size() + (shard.end - shard.next);
  }
  for (const ThreadScratch& scratch : scratch_) memory.free_slots += scratch.freed.size();
  return memory;
}

std::string HostStore::check_invariants() const {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  if (!index_.is_consistent()) return "an index entry cannot be reached from its home, or counts differ";
  std::vector<uint8_t> uses(slots_handed_out_);
  std::vector<uint64_t> rows_of_table(initializers_.size()), candidates_of_table(initializers_.size());
  const Entry* const entries = index_.view().entries;
  for (uint64_t i = 0; i < index_.capacity() * kNumShards; ++i) {
    if (entries[i].is_empty()) continue;
    const uint32_t table = entries[i].table();
    if (table >= rows_of_table.size()) return "an index entry names an unknown table";
    if (entries[i].is_candidate()) {
      if (entries[i].count() == 0) return "a key is counted that never occurred";
      ++candidates_of_table[table];
      continue;
    }
    if (entries[i].slot() >= uses.size()) return "an index entry names a slot that was never handed out";
    ++uses[entries[i].slot()];
    ++rows_of_table[table];
  }
  for (const uint32_t slot : default_slots_) {
    if (slot != kNoSlot) ++uses[slot];
  }
  for (const uint32_t slot : free_slots_) ++uses[slot];
  for (const ThreadScratch& scratch : scratch_) {
    for (const uint32_t slot : scratch.freed) ++uses[slot];
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
    if (candidates_of_table[table] != candidates_of_table_[table]) return "the number of counted keys is wrong";
    const RetentionPolicy& policy = policies_[table];
    if (is_listed(table) && listed_[table].is_kept) {
      const Listed& listed = listed_[table];
      std::set<uint64_t> living;
      for (uint64_t i = 0; i < listed.keys.size(); ++i) {
        const uint64_t key = listed.keys[i];
        const Entry* const entry = index_.find(key, table, index_.hash(key, table));
        if (entry != nullptr && (policy.evicts || entry->is_candidate())) living.insert(key);
      }
      const uint64_t expected = candidates_of_table[table] + (policy.evicts ? rows_of_table[table] : 0);
      if (living.size() != expected) return "the list of a table lacks keys";
      if (listed.keys.size() != expected + listed.dead) return "the list of a table has keys too many";
    }
    if (rows_of_table[table] > policy.max_rows || candidates_of_table[table] > policy.max_candidates) {
      return "a table is beyond its budget";
    }
  }
  return "";
}

}  // namespace penstock
