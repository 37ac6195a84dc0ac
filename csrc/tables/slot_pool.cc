// Slots of rows: handed out by extents to the shards of the index, and given back to the shards that had them first.
#include "tables/slot_pool.h"

#include <algorithm>

namespace penstock {

SlotPool::SlotPool(const RowLayout& layout, uint64_t max_bytes, uint32_t num_defaults, int num_threads)
    : layout_(layout),
      value_bytes_(layout.value_bytes()),
      max_bytes_(max_bytes != 0 ? max_bytes : 2 * uint64_t{physical_memory_bytes()}),
      num_defaults_(num_defaults),
      shards_(kNumShards),
      freed_(num_threads) {}

bool SlotPool::open() {
  const uint64_t most_rows = max_bytes_ / (value_bytes_ + layout_.state_bytes());
  const bool is_open = values_.reserve(most_rows * value_bytes_) && states_.reserve(most_rows * layout_.state_bytes()) &&
                       commit(num_defaults_);
  if (is_open) handed_out_ = num_defaults_;
  return is_open;
}

bool SlotPool::commit(uint64_t slots) {
  return values_.commit(slots * value_bytes_) && states_.commit(slots * layout_.state_bytes());
}

uint64_t SlotPool::extent_rows() const {
  // A 64th of a shard's share at a time: little is handed out and unused, and the lock is seldom taken.
  return std::clamp<uint64_t>(handed_out_ / kNumShards / 64 / kLeastExtent, 1, 256) * kLeastExtent;
}

Status SlotPool::take(uint32_t shard_number, uint32_t* slot) {
  Shard& shard = shards_[shard_number];
  if (!shard.free.empty()) {
    *slot = shard.free.back();
    shard.free.pop_back();
    return Status::kOk;
  }
  if (shard.next == shard.end) {
    const std::lock_guard<std::mutex> guard(growth_);
    const uint64_t rows = extent_rows();
    if (!free_.empty()) {
      const auto first = free_.end() - static_cast<int64_t>(std::min<uint64_t>(rows, free_.size()));
      shard.free.assign(first, free_.end());
      free_.erase(first, free_.end());
      *slot = shard.free.back();
      shard.free.pop_back();
      return Status::kOk;
    }
    if (handed_out_ + rows >= kNoSlot) return Status::kTooManyRows;
    if (!commit(handed_out_ + rows)) return Status::kOutOfMemory;
    first_owners_.insert(first_owners_.end(), rows / kLeastExtent, static_cast<uint8_t>(shard_number));
    shard.next = static_cast<uint32_t>(handed_out_);
    shard.end = static_cast<uint32_t>(handed_out_ + rows);
    handed_out_ += rows;
  }
  *slot = shard.next++;
  return Status::kOk;
}

// After rows were erased. Their slots go back to the shards that took them first, so that the rows of a shard lie together
// whatever comes and goes: in random places a look-up takes twice the time, for misses of address translation. What a shard
// has far more of than the others is for whoever needs it.
void SlotPool::give_back() {
  erased();
  std::vector<uint32_t> counts(kNumShards);
  for (const Freed& freed : freed_) {
    for (const uint32_t slot : freed.slots) ++counts[first_owner(slot)];
  }
  for (uint32_t number = 0; number < kNumShards; ++number) {
    // Not doubled, as a vector would: after a sweep of half a table these lists are a few per cent of its budget.
    std::vector<uint32_t>& free = shards_[number].free;
    const size_t needed = free.size() + counts[number];
    if (needed > free.capacity()) free.reserve(std::max(needed, free.capacity() + free.capacity() / 8));
  }
  for (Freed& freed : freed_) {
    for (const uint32_t slot : freed.slots) shards_[first_owner(slot)].free.push_back(slot);
    std::vector<uint32_t>().swap(freed.slots);  // a sweep of half a large table would otherwise stay resident
  }
  size_t free = 0;
  for (const Shard& shard : shards_) free += shard.free.size();
  const size_t most = free / kNumShards * 5 / 4 + extent_rows();
  for (Shard& shard : shards_) {
    if (shard.free.size() <= most) continue;
    free_.insert(free_.end(), shard.free.begin() + static_cast<int64_t>(most), shard.free.end());
    shard.free.resize(most);
  }
}

uint64_t SlotPool::num_free() const {
  uint64_t number = free_.size();
  for (const Shard& shard : shards_) number += shard.free.size() + (shard.end - shard.next);
  for (const Freed& freed : freed_) number += freed.slots.size();
  return number;
}

void SlotPool::count_free(std::vector<uint8_t>* uses) const {
  for (const uint32_t slot : free_) ++(*uses)[slot];
  for (const Freed& freed : freed_) {
    for (const uint32_t slot : freed.slots) ++(*uses)[slot];
  }
  for (const Shard& shard : shards_) {
    for (const uint32_t slot : shard.free) ++(*uses)[slot];
    for (uint32_t slot = shard.next; slot < shard.end; ++slot) ++(*uses)[slot];
  }
}

}  // namespace penstock
