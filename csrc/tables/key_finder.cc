// Keys to slots: runs of one table alone, short ones together.
#include "tables/key_finder.h"

#include <algorithm>

namespace penstock {

void KeyFinder::begin() {
  for (Thread& thread : threads_) {
    thread.misses.clear();
    thread.chunk->count = 0;
  }
}

bool KeyFinder::has_misses() const {
  return std::any_of(threads_.begin(), threads_.end(), [](const Thread& thread) { return !thread.misses.empty(); });
}

int64_t KeyFinder::num_misses() const {
  int64_t number = 0;
  for (const Thread& thread : threads_) number += static_cast<int64_t>(thread.misses.size());
  return number;
}

void KeyFinder::note_misses(const uint64_t* keys, int64_t count, uint32_t table, uint32_t* slots, int thread) {
  std::vector<Miss>& misses = threads_[thread].misses;
  for (int64_t i = 0; i < count; ++i) {
    if (slots[i] == kNoSlot) misses.push_back({keys[i], table, slots + i});
  }
}

void KeyFinder::flush(int thread) {
  Chunk& chunk = *threads_[thread].chunk;
  const int64_t absent =
      rows_.kernels.find(rows_.index.view(), rows_.rows(), chunk.keys, chunk.tables, chunk.count, chunk.slots);
  for (int64_t i = 0; i < chunk.count; ++i) *chunk.targets[i] = chunk.slots[i];
  if (absent != 0) {
    for (int64_t i = 0; i < chunk.count; ++i) {
      if (chunk.slots[i] == kNoSlot) threads_[thread].misses.push_back({chunk.keys[i], chunk.tables[i], chunk.targets[i]});
    }
  }
  chunk.count = 0;
}

void KeyFinder::find(const int64_t* signed_keys, int64_t count, uint32_t table, uint32_t* slots, int thread) {
  const uint64_t* const keys = reinterpret_cast<const uint64_t*>(signed_keys);
  if (count >= kMinRun) {
    const int64_t absent = rows_.kernels.find_run(rows_.index.view(), rows_.rows(), keys, table, count, slots);
    if (absent != 0) note_misses(keys, count, table, slots, thread);
    return;
  }
  Chunk& chunk = *threads_[thread].chunk;
  if (chunk.count + count > Chunk::kCapacity) flush(thread);
  std::copy_n(keys, count, chunk.keys + chunk.count);
  std::fill_n(chunk.tables + chunk.count, count, table);
  for (int64_t i = 0; i < count; ++i) chunk.targets[chunk.count + i] = slots + i;
  chunk.count += count;
}

void KeyFinder::find_tile(const PoolingPlan& plan, const PackedKeys& batch, const Tile& tile, uint32_t* slots, int thread) {
  for (int64_t f = tile.first_feature; f < tile.last_feature; ++f) {
    const int64_t bag = plan.packed_feature[f] * batch.batch_size;
    const int64_t first = batch.begin(bag + tile.begin);
    const int64_t count = batch.begin(bag + tile.end) - first;
    find(batch.keys + first, count, plan.table[f], slots + first, thread);
  }
  flush(thread);
}

}  // namespace penstock
