#include "host_store.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace penstock {
namespace {

constexpr int64_t kChunkKeys = 4096;       // keys of one task where there are no samples
constexpr int64_t kTileBytes = 256 << 10;  // rows of one tile: found and prefetched, then pooled, within the L2 cache
constexpr size_t kStreamBytes = 1 << 20;  // an output larger than this will not stay in the caches anyway
constexpr uint32_t kNumBuckets = 64;

uint32_t bucket_of(uint32_t slot) { return (slot * 0x9E3779B1u) >> 26; }

uint32_t extent_rows(uint64_t handed_out) {
  // An eighth of a shard's share at a time: small stores waste little, large ones seldom take the lock.
  return static_cast<uint32_t>(std::clamp<uint64_t>(handed_out / kNumShards / 8, 16, 4096));
}

template <typename T>
void ensure_size(std::vector<T>& v, size_t size) {
  if (v.size() < size) v.resize(std::max(size, v.size() + v.size() / 2));
}

}  // namespace

HostStore::HostStore(uint32_t dim, OptimizerKind optimizer, std::vector<Initializer> initializers, int num_threads,
                     uint64_t max_bytes)
    : dim_(dim),
      state_dim_(optimizer_state_dim(optimizer, dim)),
      max_bytes_(max_bytes != 0 ? max_bytes : 2 * uint64_t{physical_memory_bytes()}),
      kernels_(select_row_kernels(dim, optimizer, &isa_)),
      initializers_(std::move(initializers)),
      pool_(num_threads),
      shards_(kNumShards),
      scratch_(num_threads) {
  for (ShardSlots& shard : shards_) shard.rows_of_table.resize(initializers_.size());
}

bool HostStore::open() {
  const uint64_t floats = dim_ + state_dim_;
  return index_.open() && values_.reserve(max_bytes_ / floats * dim_) && states_.reserve(max_bytes_ / floats * state_dim_);
}

bool HostStore::commit_slots(uint64_t slots) {
  return values_.commit(slots * dim_ * sizeof(float)) && states_.commit(slots * state_dim_ * sizeof(float));
}

int64_t HostStore::samples_per_tile(const PoolingPlan& plan, const PackedKeys& batch) const {
  int64_t keys = 0;
  for (int64_t f = 0; f < plan.num_features; ++f) {
    const int64_t* const bags = batch.offsets + plan.packed_feature[f] * batch.batch_size;
    keys += bags[batch.batch_size] - bags[0];
  }
  const int64_t keys_per_tile = std::clamp<int64_t>(kTileBytes / (int64_t{dim_} * 4), 64, 2048);
  const int64_t for_cache = keys_per_tile * batch.batch_size / std::max<int64_t>(keys, 1);
  const int64_t for_balance = batch.batch_size / (int64_t{4} * num_threads());
  return std::max<int64_t>(1, std::min(for_cache, for_balance));
}

bool HostStore::flush(ThreadScratch& scratch) {
  KeyChunk& chunk = *scratch.chunk;
  const int64_t absent =
      kernels_.find(index_.view(), rows(), chunk.keys, chunk.tables, chunk.count, chunk.slots);
  for (int64_t i = 0; i < chunk.count; ++i) *chunk.targets[i] = chunk.slots[i];
  if (absent != 0) {
    for (int64_t i = 0; i < chunk.count; ++i) {
      if (chunk.slots[i] == kNoSlot) scratch.misses.push_back({chunk.keys[i], chunk.tables[i], chunk.targets[i]});
    }
  }
  chunk.count = 0;
  return absent != 0;
}

bool HostStore::find_keys(const int64_t* keys, int64_t count, uint32_t table, uint32_t* slots,
                          ThreadScratch& scratch) {
  KeyChunk& chunk = *scratch.chunk;
  bool has_misses = false;
  for (int64_t first = 0; first < count;) {
    const int64_t size = std::min(count - first, KeyChunk::kCapacity - chunk.count);
    for (int64_t i = 0; i < size; ++i) {
      chunk.keys[chunk.count + i] = static_cast<uint64_t>(keys[first + i]);
      chunk.tables[chunk.count + i] = table;
      chunk.targets[chunk.count + i] = slots + first + i;
    }
    chunk.count += size;
    first += size;
    if (chunk.count == KeyChunk::kCapacity) has_misses |= flush(scratch);
  }
  return has_misses;
}

bool HostStore::find_tile(const PoolingPlan& plan, const PackedKeys& batch, int64_t begin, int64_t end,
                          uint32_t* slots, ThreadScratch& scratch) {
  bool has_misses = false;
  for (int64_t f = 0; f < plan.num_features; ++f) {
    const int64_t* const bags = batch.offsets + plan.packed_feature[f] * batch.batch_size;
    const int64_t first = bags[begin];
    has_misses |= find_keys(batch.keys + first, bags[end] - first, plan.table[f], slots + first, scratch);
  }
  return flush(scratch) || has_misses;
}

Status HostStore::pooled_lookup(const PoolingPlan& plan, const PackedKeys& batch, bool insert, float* out,
                                Lookup* lookup) {
  const std::lock_guard<std::mutex> guard(call_);
  const int64_t samples = samples_per_tile(plan, batch);
  const int64_t tiles = (batch.batch_size + samples - 1) / samples;
  const bool stream = static_cast<size_t>(batch.batch_size * plan.stride) * sizeof(float) > kStreamBytes;
  lookup->slots.resize(static_cast<size_t>(batch.offsets[batch.num_bags()]));
  lookup->erase_version = erase_version_;
  tile_has_misses_.assign(static_cast<size_t>(tiles), 0);
  for (ThreadScratch& scratch : scratch_) scratch.misses.clear();
  const auto pool_tile = [&](int64_t tile) {
    const int64_t begin = tile * samples;
    kernels_.pool(rows(), plan, batch, lookup->slots.data(), initializers_.data(), begin,
                  std::min(begin + samples, batch.batch_size), stream, out);
  };
  pool_.run(tiles, [&](int64_t tile, int thread) {
    const int64_t begin = tile * samples;
    const bool has_misses = find_tile(plan, batch, begin, std::min(begin + samples, batch.batch_size),
                                      lookup->slots.data(), scratch_[thread]);
    if (has_misses && insert) {
      tile_has_misses_[tile] = 1;
    } else {
      pool_tile(tile);
    }
  });
  lookup->num_missing = 0;
  for (const ThreadScratch& scratch : scratch_) lookup->num_missing += static_cast<int64_t>(scratch.misses.size());
  if (!insert || lookup->num_missing == 0) return Status::kOk;
  const Status status = insert_misses();
  if (status != Status::kOk) return status;
  lookup->num_missing = 0;
  pool_.run(tiles, [&](int64_t tile, int) {
    if (tile_has_misses_[tile]) pool_tile(tile);
  });
  return Status::kOk;
}

Status HostStore::take_slot(ShardSlots& shard, uint32_t* slot) {
  if (!shard.free.empty()) {
    *slot = shard.free.back();
    shard.free.pop_back();
    return Status::kOk;
  }
  if (shard.next == shard.end) {
    const std::lock_guard<std::mutex> guard(arena_growth_);
    const uint64_t rows = extent_rows(slots_handed_out_);
    if (slots_handed_out_ + rows >= kNoSlot) return Status::kTooManyRows;
    if (!commit_slots(slots_handed_out_ + rows)) return Status::kOutOfMemory;
    shard.next = static_cast<uint32_t>(slots_handed_out_);
    shard.end = static_cast<uint32_t>(slots_handed_out_ + rows);
    slots_handed_out_ += rows;
  }
  *slot = shard.next++;
  return Status::kOk;
}

Status HostStore::insert_shard(uint32_t shard_number, const Miss* misses, int64_t count, int64_t* done) {
  constexpr int64_t kAhead = 8;
  const IndexView index = index_.view();
  ShardSlots& shard = shards_[shard_number];
  for (int64_t& i = *done; i < count; ++i) {
    if (i + kAhead < count) {
      const uint64_t hash = index_.hash(misses[i + kAhead].key, misses[i + kAhead].table);
      __builtin_prefetch(index.shard(hash) + index.home(hash), 1);
    }
    const Miss& miss = misses[i];
    const uint64_t hash = index_.hash(miss.key, miss.table);
    uint32_t slot = index_.find(miss.key, miss.table, hash);
    if (slot == kNoSlot) {
      if (index_.count(shard_number) >= index_.limit()) return Status::kIndexFull;
      const Status status = take_slot(shard, &slot);
      if (status != Status::kOk) return status;
      kernels_.initialize(rows(), initializers_[miss.table], miss.key, rows().value(slot), rows().state(slot));
      index_.insert(miss.key, miss.table, hash, slot);
      ++shard.rows_of_table[miss.table];
    }
    *miss.slot = slot;
  }
  return Status::kOk;
}

Status HostStore::insert_misses() {
  ++content_version_;
  const auto shard_of = [this](const Miss& miss) { return Index::shard_of(index_.hash(miss.key, miss.table)); };
  // Counting sort by shard; each thread's misses stay in their order.
  const int64_t threads = num_threads();
  std::vector<int64_t> begin(kNumShards * threads + 1);
  pool_.run(threads, [&](int64_t t, int) {
    for (const Miss& miss : scratch_[t].misses) ++begin[shard_of(miss) * threads + t + 1];
  });
  for (size_t i = 1; i < begin.size(); ++i) begin[i] += begin[i - 1];
  ensure_size(sorted_misses_, static_cast<size_t>(begin.back()));
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  pool_.run(threads, [&](int64_t t, int) {
    for (const Miss& miss : scratch_[t].misses) sorted_misses_[next[shard_of(miss) * threads + t]++] = miss;
  });
  std::vector<int64_t> done(kNumShards);
  std::vector<Status> status(kNumShards);
  for (;;) {
    pool_.run(kNumShards, [&](int64_t shard, int) {
      const int64_t first = begin[shard * threads];
      status[shard] = insert_shard(static_cast<uint32_t>(shard), sorted_misses_.data() + first,
                                   begin[(shard + 1) * threads] - first, &done[shard]);
    });
    bool is_full = false;
    for (const Status s : status) {
      if (s != Status::kOk && s != Status::kIndexFull) return s;
      is_full |= s == Status::kIndexFull;
    }
    if (!is_full) return Status::kOk;
    if (!index_.grow(pool_)) return Status::kOutOfMemory;
  }
}

Status HostStore::refresh(const PoolingPlan& plan, LookupGradient& gradient) {
  // Rows that were erased since the look-up begin anew.
  Lookup& lookup = *gradient.lookup;
  if (lookup.erase_version == erase_version_ && lookup.num_missing == 0) return Status::kOk;
  for (ThreadScratch& scratch : scratch_) scratch.misses.clear();
  find_tile(plan, gradient.batch, 0, gradient.batch.batch_size, lookup.slots.data(), scratch_[0]);
  lookup.erase_version = erase_version_;
  lookup.num_missing = 0;
  return scratch_[0].misses.empty() ? Status::kOk : insert_misses();
}

void HostStore::sort_occurrences(const PoolingPlan& plan, const std::vector<LookupGradient>& gradients) {
  // Chunks of samples are counted, then placed, in parallel. The order within a bucket is that of (look-up, sample,
  // feature, key), whatever the number of chunks, so sums do not depend on the number of threads.
  const int64_t per_gradient = num_threads() * 4;
  const int64_t chunks = per_gradient * static_cast<int64_t>(gradients.size());
  std::vector<int64_t> next(static_cast<size_t>(chunks * kNumBuckets));
  const auto visit = [&](int64_t chunk, const auto& body) {
    const LookupGradient& gradient = gradients[chunk / per_gradient];
    const int64_t part = chunk % per_gradient, size = gradient.batch.batch_size;
    const uint32_t* const slots = gradient.lookup->slots.data();
    for (int64_t b = size * part / per_gradient; b < size * (part + 1) / per_gradient; ++b) {
      for (int64_t f = 0; f < plan.num_features; ++f) {
        const int64_t* const bag = gradient.batch.offsets + plan.packed_feature[f] * size + b;
        for (int64_t n = bag[0]; n < bag[1]; ++n) body(gradient, b, f, slots[n], bag[1] - bag[0]);
      }
    }
  };
  pool_.run(chunks, [&](int64_t chunk, int) {
    int64_t* const counts = next.data() + chunk * kNumBuckets;
    visit(chunk, [&](const LookupGradient&, int64_t, int64_t, uint32_t slot, int64_t) { ++counts[bucket_of(slot)]; });
  });
  bucket_begin_.assign(kNumBuckets + 1, 0);
  int64_t total = 0;
  for (uint32_t bucket = 0; bucket < kNumBuckets; ++bucket) {
    bucket_begin_[bucket] = total;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t count = next[chunk * kNumBuckets + bucket];
      next[chunk * kNumBuckets + bucket] = total;
      total += count;
    }
  }
  bucket_begin_[kNumBuckets] = total;
  ensure_size(occurrences_, static_cast<size_t>(total));
  pool_.run(chunks, [&](int64_t chunk, int) {
    int64_t* const place = next.data() + chunk * kNumBuckets;
    visit(chunk, [&](const LookupGradient& gradient, int64_t b, int64_t f, uint32_t slot, int64_t bag_size) {
      const float scale = plan.is_mean[f] && bag_size > 1 ? 1.0f / static_cast<float>(bag_size) : 1.0f;
      const float* const grad = gradient.grad + b * plan.stride + plan.column[f];
      occurrences_[place[bucket_of(slot)]++] = {Occurrence::pack(grad, plan.table[f]), slot, scale};
    });
  });
}

Status HostStore::apply_gradients(const PoolingPlan& plan, std::vector<LookupGradient>& gradients,
                                  const Hyper* hypers, int64_t* rows_updated) {
  const std::lock_guard<std::mutex> guard(call_);
  for (LookupGradient& gradient : gradients) {
    const Status status = refresh(plan, gradient);
    if (status != Status::kOk) return status;
  }
  sort_occurrences(plan, gradients);
  for (ThreadScratch& scratch : scratch_) scratch.rows = 0;
  pool_.run(kNumBuckets, [&](int64_t bucket, int thread) {
    const int64_t first = bucket_begin_[bucket], count = bucket_begin_[bucket + 1] - first;
    if (count == 0) return;
    ThreadScratch& scratch = scratch_[thread];
    uint64_t hash_size = 64;
    while (hash_size < 2 * static_cast<uint64_t>(count)) hash_size *= 2;
    ensure_size(scratch.hash_slots, hash_size);
    ensure_size(scratch.unique_of, static_cast<size_t>(count));
    ensure_size(scratch.begin, static_cast<size_t>(count) + 1);
    ensure_size(scratch.order, static_cast<size_t>(count));
    scratch.rows += kernels_.update(rows(), occurrences_.data() + first, count, hypers,
                                    {scratch.hash_slots.data(), scratch.unique_of.data(), scratch.begin.data(),
                                     scratch.order.data(), hash_size});
  });
  *rows_updated = 0;
  for (const ThreadScratch& scratch : scratch_) *rows_updated += scratch.rows;
  return Status::kOk;
}

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
  StoreMemory memory{0, 0, slots_handed_out_, index_.memory_bytes(), values_.committed() + states_.committed()};
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
