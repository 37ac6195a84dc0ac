// Probe, insert, erase by shifting back, growth.
#include "index/index.h"

#include <algorithm>
#include <random>
#include <utility>

namespace penstock {

bool Index::allocate(uint64_t capacity, Region* region) {
  const size_t bytes = capacity * kNumShards * sizeof(Entry);
  return region->reserve(bytes) && region->commit(bytes);
}

bool Index::open() {
  if (!allocate(kInitialCapacity, &region_)) return false;
  capacity_ = kInitialCapacity;
  std::random_device entropy;
  salt_ = uint64_t{entropy()} << 32 | entropy() | 1;
  std::fill_n(entries(), capacity_ * kNumShards, Entry{0, Entry::kEmpty});
  return true;
}

Entry* Index::find(uint64_t key, uint32_t table, uint64_t hash) const {
  const IndexView index = view();
  Entry* const shard = index.shard(hash);
  for (uint64_t i = index.home(hash);; i = i + 1 == capacity_ ? 0 : i + 1) {
    if (shard[i].is_empty()) return nullptr;
    if (shard[i].key == key && shard[i].table() == table) return shard + i;
  }
}

void Index::place(Entry* shard, uint64_t capacity, uint64_t home, Entry entry) {
  uint64_t i = home;
  while (!shard[i].is_empty()) i = i + 1 == capacity ? 0 : i + 1;
  shard[i] = entry;
}

void Index::insert(uint64_t key, uint64_t meta, uint64_t hash) {
  const IndexView index = view();
  place(index.shard(hash), capacity_, index.home(hash), Entry{key, meta});
  ++counts_[shard_of(hash)].entries;
}

void Index::erase(Entry* entry) {
  const IndexView index = view();
  const uint64_t number = static_cast<uint64_t>(entry - entries()) / capacity_;
  Entry* const shard = entries() + number * capacity_;
  const auto after = [this](uint64_t i) { return i + 1 == capacity_ ? 0 : i + 1; };
  uint64_t hole = static_cast<uint64_t>(entry - shard);
  // Close the gap: an entry moves back into the hole unless its home lies cyclically within (hole, entry].
  for (uint64_t i = after(hole); !shard[i].is_empty(); i = after(i)) {
    const uint64_t home = index.home(index.hash(shard[i].key, shard[i].table()));
    const uint64_t from_home = i >= home ? i - home : i + capacity_ - home;
    const uint64_t from_hole = i >= hole ? i - hole : i + capacity_ - hole;
    if (from_home < from_hole) continue;
    shard[hole] = shard[i];
    hole = i;
  }
  shard[hole] = Entry{0, Entry::kEmpty};
  --counts_[number].entries;
}

bool Index::grow(ThreadPool& pool, const Growth& growth) {
  // Small indexes double; large ones grow by less, to keep the memory per row low. The last step leads to a load of
  // 0.74, so that shards a little fuller than the average do not call for another one.
  uint64_t capacity = capacity_ < 1024 ? capacity_ * 2 : capacity_ + capacity_ * growth.percent / 100;
  const uint64_t enough = growth.most_entries / kNumShards / 74 * 100 + 100;
  if (capacity_ >= 1024 && capacity_ < enough) capacity = std::min(capacity, enough);
  capacity = (capacity + kLineEntries - 1) / kLineEntries * kLineEntries;
  Region region;
  if (!allocate(capacity, &region)) return false;
  const IndexView old = view();
  const IndexView fresh{reinterpret_cast<Entry*>(region.data()), capacity, salt_};
  pool.run(kNumShards, [&](int64_t shard, int) {
    Entry* const from = old.entries + shard * old.capacity;
    Entry* const to = fresh.entries + shard * capacity;
    std::fill_n(to, capacity, Entry{0, Entry::kEmpty});
    for (uint64_t i = 0; i < old.capacity; ++i) {
      if (from[i].is_empty()) continue;
      place(to, capacity, fresh.home(fresh.hash(from[i].key, from[i].table())), from[i]);
    }
    // Old and new need not be resident together.
    const size_t begin = reinterpret_cast<char*>(from) - region_.data();
    region_.release(begin, begin + old.capacity * sizeof(Entry));
  });
  region_ = std::move(region);
  capacity_ = capacity;
  return true;
}

uint64_t Index::longest_probe() const {
  uint64_t longest = 0;
  for (uint64_t i = 0; i < capacity_ * kNumShards; ++i) {
    const Entry& entry = entries()[i];
    if (entry.is_empty()) continue;
    const uint64_t home = view().home(hash(entry.key, entry.table()));
    const uint64_t place = i % capacity_;
    longest = std::max(longest, (place >= home ? place - home : place + capacity_ - home) + 1);
  }
  return longest;
}

bool Index::is_consistent() const {
  for (uint32_t shard = 0; shard < kNumShards; ++shard) {
    const Entry* const from = entries() + shard * capacity_;
    uint64_t entries = 0;
    for (uint64_t i = 0; i < capacity_; ++i) {
      if (from[i].is_empty()) continue;
      ++entries;
      const uint64_t hash = this->hash(from[i].key, from[i].table());
      if (shard_of(hash) != shard || find(from[i].key, from[i].table(), hash) != from + i) return false;
    }
    if (entries != counts_[shard].entries) return false;
  }
  return true;
}

}  // namespace penstock
