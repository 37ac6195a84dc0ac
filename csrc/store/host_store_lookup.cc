// Looks batches up, tile by tile: finds the rows of the keys and pools them.
#include "store/host_store.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <utility>

namespace penstock {
namespace {

constexpr int64_t kTileBytes = 256 << 10;  // rows of one tile: found and prefetched, then pooled, within the L2 cache
constexpr size_t kStreamBytes = 1 << 20;  // an output larger than this will not stay in the caches anyway
constexpr int64_t kMinRun = 64;  // keys of one table that are worth a pass of their own; fewer go with those of others
constexpr float kLargestFloat = std::numeric_limits<float>::max();
constexpr int64_t kBagsPerTask = 1 << 15;
constexpr int64_t kKeysPerTask = 1 << 16;

int64_t num_tasks(int64_t items, int64_t items_per_task) { return (items + items_per_task - 1) / items_per_task; }

// Offsets must rise.
bool sequences_fit(const PoolingPlan& plan, const PackedKeys& batch) {
  for (int64_t f = 0; f < plan.num_features; ++f) {
    if (plan.pooling[f] != Pooling::kSequence) continue;
    const int64_t first = plan.packed_feature[f] * batch.batch_size;
    int64_t longest = 0;
    for (int64_t bag = first; bag < first + batch.batch_size; ++bag) {
      longest = std::max(longest, batch.begin(bag + 1) - batch.begin(bag));
    }
    if (longest > plan.max_keys[f]) return false;
  }
  return true;
}

}  // namespace

// Offsets are looked at before they are copied; whether they are right is found of the copies, which nobody else can change.
bool HostStore::is_one_hot(const PackedKeys& given) {
  const int64_t bags = given.num_bags();
  if (bags != given.num_keys || given.offsets[0] != 0) return false;  // without bags no other offset is looked at
  std::atomic<bool> is_other{false};
  pool_.run(num_tasks(bags, kBagsPerTask), [&](int64_t task, int) {
    const int64_t first = task * kBagsPerTask, last = std::min(first + kBagsPerTask, bags);
    int64_t differences = given.offsets[last] ^ last;
    for (int64_t bag = first; bag < last; ++bag) differences |= given.offsets[bag] ^ bag;
    if (differences != 0) is_other = true;
  });
  return !is_other;
}

Status HostStore::take_offsets(const PackedKeys& given, int64_t* offsets) {
  const int64_t bags = given.num_bags();
  pool_.run(num_tasks(bags + 1, kBagsPerTask), [&](int64_t task, int) {
    const int64_t first = task * kBagsPerTask, last = std::min(first + kBagsPerTask, bags + 1);
    std::copy(given.offsets + first, given.offsets + last, offsets + first);
  });
  if (offsets[0] != 0 || offsets[bags] != given.num_keys) return Status::kBadOffsets;
  std::atomic<bool> is_rising{true};
  pool_.run(num_tasks(bags, kBagsPerTask), [&](int64_t task, int) {
    const int64_t first = task * kBagsPerTask, last = std::min(first + kBagsPerTask, bags);
    int64_t falls = 0;
    for (int64_t bag = first; bag < last; ++bag) falls += offsets[bag + 1] < offsets[bag];
    if (falls != 0) is_rising = false;
  });
  return is_rising ? Status::kOk : Status::kBadOffsets;
}

bool HostStore::take_weights(const PackedKeys& given, float* weights) {
  std::atomic<bool> is_finite{true};
  pool_.run(num_tasks(given.num_keys, kKeysPerTask), [&](int64_t task, int) {
    const int64_t first = task * kKeysPerTask, last = std::min(first + kKeysPerTask, given.num_keys);
    std::copy(given.weights + first, given.weights + last, weights + first);
    bool mine = true;
    for (int64_t n = first; n < last; ++n) mine &= std::abs(weights[n]) <= kLargestFloat;
    if (!mine) is_finite = false;
  });
  return is_finite;
}

void HostStore::take_keys(const PoolingPlan& plan, const PackedKeys& batch, const int64_t* given, const Tile& tile,
                          int64_t* keys) {
  for (int64_t f = tile.first_feature; f < tile.last_feature; ++f) {
    const int64_t bag = plan.packed_feature[f] * batch.batch_size;
    const int64_t first = batch.begin(bag + tile.begin), last = batch.begin(bag + tile.end);
    std::copy(given + first, given + last, keys + first);
  }
}

// Makes the look-up's arrays, and copies all but the keys. Where there are no weights there is no array for them, nor for
// offsets where every bag has one key.
Status HostStore::take_batch(const PoolingPlan& plan, const PackedKeys& given, Lookup* lookup) {
  const bool has_offsets = !is_one_hot(given), has_weights = given.weights != nullptr;
  const size_t keys = static_cast<size_t>(given.num_keys), offsets = has_offsets ? given.num_bags() + 1 : 0;
  const size_t key_bytes = sizeof(int64_t) + sizeof(uint32_t) + (has_weights ? sizeof(float) : 0);
  lookup->memory = lookup_memory_->take(keys * key_bytes + offsets * sizeof(int64_t));
  if (lookup->memory == nullptr) throw std::bad_alloc();
  lookup->keys = reinterpret_cast<int64_t*>(lookup->memory->region.data());
  lookup->offsets = has_offsets ? lookup->keys + keys : nullptr;
  lookup->slots = reinterpret_cast<uint32_t*>(lookup->keys + keys + offsets);
  lookup->weights = has_weights ? reinterpret_cast<float*>(lookup->slots + keys) : nullptr;
  lookup->batch_size = given.batch_size;
  lookup->num_features = given.num_features;
  lookup->num_keys = given.num_keys;
  if (has_offsets) {
    const Status status = take_offsets(given, lookup->offsets);
    if (status != Status::kOk) return status;
  }
  if (!sequences_fit(plan, lookup->batch())) return Status::kBagTooLong;
  if (has_weights && !take_weights(given, lookup->weights)) return Status::kBadWeights;
  return Status::kOk;
}

std::vector<Tile> HostStore::lookup_tiles(const PoolingPlan& plan, const PackedKeys& batch) const {
  const int64_t size = batch.batch_size;
  if (plan.num_features == 0) return {};  // tables that no feature of this batch reads
  const int64_t keys_per_tile = std::clamp<int64_t>(kTileBytes / int64_t{value_bytes_}, 64, 2048);
  // Whole cache lines are written feature by feature, so that one table's hot rows stay in the cache; where features
  // share cache lines of the output, all features of a few samples go together.
  const int64_t features = dim_ % 16 == 0 ? 1 : plan.num_features;
  const int64_t for_balance = size * plan.num_features / features / (int64_t{8} * num_threads()) + 1;
  std::vector<Tile> tiles;
  for (int64_t first = 0; first < plan.num_features; first += features) {
    const int64_t last = std::min(first + features, plan.num_features);
    int64_t keys = 0;
    for (int64_t f = first; f < last; ++f) {
      const int64_t bag = plan.packed_feature[f] * size;
      keys += batch.begin(bag + size) - batch.begin(bag);
    }
    const int64_t per_sample = std::max<int64_t>(1, keys / std::max<int64_t>(1, size));
    const int64_t samples = std::clamp<int64_t>(keys_per_tile / per_sample, 1, for_balance);
    for (int64_t b = 0; b < size; b += samples) tiles.push_back({first, last, b, std::min(b + samples, size)});
  }
  return tiles;
}

void HostStore::note_misses(const uint64_t* keys, int64_t count, uint32_t table, uint32_t* slots, ThreadScratch& scratch) {
  for (int64_t i = 0; i < count; ++i) {
    if (slots[i] == kNoSlot) scratch.misses.push_back({keys[i], table, slots + i});
  }
}

void HostStore::flush(ThreadScratch& scratch) {
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
}

void HostStore::find_keys(const int64_t* signed_keys, int64_t count, uint32_t table, uint32_t* slots,
                          ThreadScratch& scratch) {
  const uint64_t* const keys = reinterpret_cast<const uint64_t*>(signed_keys);
  if (count >= kMinRun) {
    const int64_t absent = kernels_.find_run(index_.view(), rows(), keys, table, count, slots);
    if (absent != 0) note_misses(keys, count, table, slots, scratch);
    return;
  }
  KeyChunk& chunk = *scratch.chunk;
  if (chunk.count + count > KeyChunk::kCapacity) flush(scratch);
  std::copy_n(keys, count, chunk.keys + chunk.count);
  std::fill_n(chunk.tables + chunk.count, count, table);
  for (int64_t i = 0; i < count; ++i) chunk.targets[chunk.count + i] = slots + i;
  chunk.count += count;
}

void HostStore::find_tile(const PoolingPlan& plan, const PackedKeys& batch, const Tile& tile, uint32_t* slots,
                          ThreadScratch& scratch) {
  for (int64_t f = tile.first_feature; f < tile.last_feature; ++f) {
    const int64_t bag = plan.packed_feature[f] * batch.batch_size;
    const int64_t first = batch.begin(bag + tile.begin);
    const int64_t count = batch.begin(bag + tile.end) - first;
    find_keys(batch.keys + first, count, plan.table[f], slots + first, scratch);
  }
  flush(scratch);
}

void HostStore::look_up_tile(const PoolingPlan& plan, const PackedKeys& batch, const Tile& tile, uint32_t* slots,
                             bool stream, float* out, ThreadScratch& scratch) {
  const int64_t count = tile.end - tile.begin;
  for (int64_t f = tile.first_feature; f < tile.last_feature; ++f) {
    const int64_t first = plan.packed_feature[f] * batch.batch_size + tile.begin;
    const uint64_t* const keys = reinterpret_cast<const uint64_t*>(batch.keys) + first;
    const int64_t absent = kernels_.look_up_run(index_.view(), rows(), keys, plan.table[f], count, slots + first,
                                                plan.stride, stream, out + tile.begin * plan.stride + plan.column[f]);
    if (absent != 0) note_misses(keys, count, plan.table[f], slots + first, scratch);
  }
}

void HostStore::pool_missed(const PoolingPlan& plan, const PackedKeys& batch, const TileMisses& missed,
                            const Tile& tile, const uint32_t* slots, bool stream, float* out) {
  const auto pool = [&](const Tile& part, bool stream_part) {
    kernels_.pool(rows(), plan, batch, slots, initializers_.data(), part, stream_part, out);
  };
  const int64_t keys = (tile.end - tile.begin) * (tile.last_feature - tile.first_feature);
  if (!missed.others_are_pooled || 4 * (missed.last - missed.first) > static_cast<size_t>(keys)) {
    pool(tile, stream);
    return;
  }
  for (size_t i = missed.first; i < missed.last; ++i) {
    const int64_t position = scratch_[missed.thread].misses[i].slot - slots;
    for (int64_t f = tile.first_feature; f < tile.last_feature; ++f) {
      const int64_t b = position - plan.packed_feature[f] * batch.batch_size;
      if (b >= tile.begin && b < tile.end) pool({f, f + 1, b, b + 1}, false);
    }
  }
}

Status HostStore::pooled_lookup(std::shared_ptr<const SharedPlan> plan, const PackedKeys& batch, bool insert, float* out,
                                Lookup* lookup) {
  lookup->store = number_;
  lookup->plan = std::move(plan);
  return call([&] { return look_up(lookup->plan->view(), batch, insert, out, lookup); });
}

Status HostStore::look_up(const PoolingPlan& plan, const PackedKeys& given, bool insert, float* out, Lookup* lookup) {
  if (const Status status = take_batch(plan, given, lookup); status != Status::kOk) return status;
  const PackedKeys batch = lookup->batch();
  const std::vector<Tile> tiles = lookup_tiles(plan, batch);
  const bool stream = static_cast<size_t>(batch.batch_size * plan.stride) * sizeof(float) > kStreamBytes;
  lookup->erase_version = erase_version_;
  uint32_t* const slots = lookup->slots;
  tile_misses_.resize(tiles.size());
  const bool is_plain = batch.is_one_hot && batch.weights == nullptr &&
                        std::find(plan.pooling, plan.pooling + plan.num_features, Pooling::kSequence) ==
                            plan.pooling + plan.num_features;
  pool_.run(static_cast<int64_t>(tiles.size()), [&](int64_t number, int thread) {
    ThreadScratch& scratch = scratch_[thread];
    const Tile& tile = tiles[number];
    TileMisses& missed = tile_misses_[number];
    missed = {thread, is_plain && tile.end - tile.begin >= kMinRun, scratch.misses.size(), 0};
    take_keys(plan, batch, given.keys, tile, lookup->keys);
    if (missed.others_are_pooled) {
      look_up_tile(plan, batch, tile, slots, stream, out, scratch);
    } else {
      find_tile(plan, batch, tile, slots, scratch);
    }
    missed.last = scratch.misses.size();
    if (insert && missed.first != missed.last) return;
    for (size_t i = missed.first; i < missed.last; ++i) {
      *scratch.misses[i].slot = default_slots_[scratch.misses[i].table];
    }
    pool_missed(plan, batch, missed, tile, slots, stream, out);
  });
  for (const ThreadScratch& scratch : scratch_) lookup->num_missing += static_cast<int64_t>(scratch.misses.size());
  if (!insert || lookup->num_missing == 0) return Status::kOk;
  std::vector<SlotSpan> in_use;
  if (retains_) {
    for (int64_t f = 0; f < plan.num_features; ++f) {
      const int64_t bag = plan.packed_feature[f] * batch.batch_size, first = batch.begin(bag);
      in_use.push_back({plan.table[f], slots + first, batch.begin(bag + batch.batch_size) - first});
    }
  }
  const Status status = insert_misses(Insert::kAdmitted, in_use);
  if (status != Status::kOk) return status;
  lookup->erase_version = erase_version_;
  lookup->num_missing = 0;
  pool_.run(static_cast<int64_t>(tiles.size()), [&](int64_t tile, int) {
    const TileMisses& missed = tile_misses_[tile];
    if (missed.first != missed.last) pool_missed(plan, batch, missed, tiles[tile], slots, stream, out);
  });
  return Status::kOk;
}

}  // namespace penstock
