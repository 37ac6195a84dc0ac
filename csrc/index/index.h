// (table, key) -> slot or count: open addressing over 16-byte entries, in shards that threads own one at a time.
//
// A key's hash picks the shard (top bits) and the home position in it (the rest, scaled to the capacity, so that the
// capacity need not be a power of two), which is the first of a cache line: most finds read one line, and compare its
// entries without a branch each. Linear probing, wrapping within the shard; deletion shifts entries back, so there
// are no tombstones. The hash is salted per index: rows exported from one and inserted into another would otherwise come in
// the order of their homes, and pile up in a small part of an index that has yet to grow. All shards have one capacity and lie in one range of 2 MiB pages; they grow together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "index/hashing.h"
#include "system/memory.h"
#include "system/thread_pool.h"

namespace penstock {

constexpr int kShardBits = 6;
constexpr uint32_t kNumShards = 1u << kShardBits;
constexpr uint32_t kNoSlot = ~0u;
constexpr uint32_t kMaxTables = (1u << 16) - 1;

// An entry names a key's row, or counts a key that has none yet (a candidate).
struct Entry {
  uint64_t key;
  uint64_t meta;  // table << 48 | count << 32 | slot; kEmpty: free

  static constexpr uint64_t kEmpty = ~uint64_t{0};
  static uint64_t pack(uint32_t table, uint32_t slot) { return uint64_t{table} << 48 | slot; }
  static uint64_t pack_candidate(uint32_t table, uint32_t count) { return uint64_t{table} << 48 | uint64_t{count} << 32 | kNoSlot; }
  bool is_candidate() const { return slot() == kNoSlot && meta != kEmpty; }
  uint32_t count() const { return static_cast<uint32_t>(meta >> 32) & 0xFFFF; }
  [[gnu::always_inline]] uint32_t slot() const { return static_cast<uint32_t>(meta); }
  [[gnu::always_inline]] uint32_t table() const { return static_cast<uint32_t>(meta >> 48); }
  [[gnu::always_inline]] bool is_empty() const { return meta == kEmpty; }
};
static_assert(sizeof(Entry) == 16);
constexpr uint64_t kLineEntries = 64 / sizeof(Entry);

// What a probe needs; plain data so that kernels of any instruction set can read it.
struct IndexView {
  Entry* entries;
  uint64_t capacity;  // entries of one shard, whole cache lines
  uint64_t salt;  // odd

  // Each table has a random-looking mask of its own: keys of one pattern in many tables do not meet.
  [[gnu::always_inline]] uint64_t mask(uint32_t table) const { return salt * (2 * uint64_t{table} + 1); }
  [[gnu::always_inline]] uint64_t hash(uint64_t key, uint32_t table) const { return mix64(key ^ mask(table)); }
  [[gnu::always_inline]] Entry* shard(uint64_t hash) const { return entries + (hash >> (64 - kShardBits)) * capacity; }
  [[gnu::always_inline]] uint64_t home(uint64_t hash) const {
    const uint64_t lines = capacity / kLineEntries;
    return kLineEntries * static_cast<uint64_t>((static_cast<unsigned __int128>(hash << kShardBits) * lines) >> 64);
  }
  // The line after `line`, which a key of that hash may be in.
  [[gnu::always_inline]] const Entry* next_line(const Entry* line, uint64_t hash) const {
    const Entry* const first = shard(hash);
    const Entry* const next = line + kLineEntries;
    return next == first + capacity ? first : next;
  }
  // Where that is among the cache lines of all shards. As capacities are whole lines, it takes one multiplication:
  // hash * lines of all shards / 2^64 is shard * lines of a shard + the other bits * lines of a shard / 2^(64 - kShardBits).
  [[gnu::always_inline]] uint64_t num_lines() const { return kNumShards * capacity / kLineEntries; }
  [[gnu::always_inline]] static uint64_t line(uint64_t hash, uint64_t num_lines) {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(hash) * num_lines) >> 64);
  }
};

struct Growth {
  uint32_t percent;       // of the capacity, that a large index gains
  uint64_t most_entries;  // the index will never hold more
};

class Index {
 public:
  // False: no memory.
  bool open();

  IndexView view() const { return {entries(), capacity_, salt_}; }
  uint64_t hash(uint64_t key, uint32_t table) const { return view().hash(key, table); }
  uint64_t capacity() const { return capacity_; }
  size_t memory_bytes() const { return region_.committed(); }

  // Whether a shard takes no other entry before all shards have grown.
  bool is_full(uint32_t shard) const { return counts_[shard].entries >= capacity_ * kMaxLoadPercent / 100; }

  static uint32_t shard_of(uint64_t hash) { return static_cast<uint32_t>(hash >> (64 - kShardBits)); }

  // The entry of (key, table), or null.
  Entry* find(uint64_t key, uint32_t table, uint64_t hash) const;

  // Adds (key, table), which must be absent; the shard must not be full. The caller owns the shard.
  void insert(uint64_t key, uint64_t meta, uint64_t hash);

  // Removes an entry that find returned; entries after it may move. The caller owns the shard.
  void erase(Entry* entry);

  // Moves all entries to a larger capacity. False: no memory, nothing changed.
  bool grow(ThreadPool& pool, const Growth& growth);

  // Entries that the unluckiest find reads.
  uint64_t longest_probe() const;

  // True if every entry can be found from its home position and the counts agree.
  bool is_consistent() const;

 private:
  // Growing by 1.3, load stays in [0.59, 0.77]: 21 to 27 bytes of index a row.
  static constexpr uint64_t kMaxLoadPercent = 77;
  static constexpr uint64_t kInitialCapacity = 64;

  struct alignas(64) Count {
    uint64_t entries = 0;
  };

  Entry* entries() const { return reinterpret_cast<Entry*>(region_.data()); }
  static bool allocate(uint64_t capacity, Region* region);
  static void place(Entry* shard, uint64_t capacity, uint64_t home, Entry entry);

  Region region_;
  uint64_t capacity_ = 0;
  uint64_t salt_ = 0;
  std::vector<Count> counts_ = std::vector<Count>(kNumShards);
};

}  // namespace penstock
