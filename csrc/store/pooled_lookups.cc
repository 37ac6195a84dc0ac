// Tiles of a batch: found, then pooled while their rows are in the cache.
#include "store/pooled_lookups.h"

#include <algorithm>

namespace penstock {
namespace {

constexpr int64_t kTileBytes = 256 << 10;  // rows of one tile: found and prefetched, then pooled, within the L2 cache
constexpr size_t kStreamBytes = 1 << 20;  // an output larger than this will not stay in the caches anyway

}  // namespace

std::vector<Tile> PooledLookups::tiles_of(const PoolingPlan& plan, const PackedKeys& batch) const {
  if (plan.num_features == 0) return {};  // tables that no feature of this batch reads
  const int64_t keys_per_tile = std::clamp<int64_t>(kTileBytes / int64_t{rows_.layout.value_bytes()}, 64, 2048);
  // Whole cache lines are written feature by feature, so that one table's hot rows stay in the cache; where features
  // share cache lines of the output, all features of a few samples go together.
  const bool by_feature = rows_.layout.dim % 16 == 0 || plan.samples != nullptr;
  const int64_t features = by_feature ? 1 : plan.num_features;
  int64_t bags = 0;
  for (int64_t f = 0; f < plan.num_features; ++f) bags += batch.samples(plan, f);
  const int64_t for_balance = bags / features / (int64_t{8} * rows_.pool.num_threads()) + 1;
  std::vector<Tile> tiles;
  for (int64_t first = 0; first < plan.num_features; first += features) {
    const int64_t last = std::min(first + features, plan.num_features), size = batch.samples(plan, first);
    int64_t keys = 0;
    for (int64_t f = first; f < last; ++f) keys += batch.count(plan, f);
    const int64_t per_sample = std::max<int64_t>(1, keys / std::max<int64_t>(1, size));
    const int64_t samples = std::clamp<int64_t>(keys_per_tile / per_sample, 1, for_balance);
    for (int64_t b = 0; b < size; b += samples) tiles.push_back({first, last, b, std::min(b + samples, size)});
  }
  return tiles;
}

void PooledLookups::look_up_tile(const PoolingPlan& plan, const PackedKeys& batch, const Tile& tile, uint32_t* slots,
                             bool stream, float* out, int thread) {
  const int64_t count = tile.end - tile.begin;
  for (int64_t f = tile.first_feature; f < tile.last_feature; ++f) {
    const int64_t first = plan.packed_feature[f] * batch.batch_size + tile.begin;
    const uint64_t* const keys = reinterpret_cast<const uint64_t*>(batch.keys) + first;
    const int64_t absent = rows_.kernels.look_up_run(rows_.index.view(), rows_.rows(), keys, plan.table[f], count, slots + first,
                                                plan.stride, stream, out + tile.begin * plan.stride + plan.column[f]);
    if (absent != 0) finder_.note_misses(keys, count, plan.table[f], slots + first, thread);
  }
}

void PooledLookups::pool_missed(const PoolingPlan& plan, const PackedKeys& batch, const TileMisses& missed,
                            const Tile& tile, const uint32_t* slots, bool stream, float* out) {
  const auto pool = [&](const Tile& part, bool stream_part) {
    rows_.kernels.pool(rows_.rows(), plan, batch, slots, rows_.tables.initializers.data(), part, stream_part, out);
  };
  const int64_t keys = (tile.end - tile.begin) * (tile.last_feature - tile.first_feature);
  if (!missed.others_are_pooled || 4 * (missed.last - missed.first) > static_cast<size_t>(keys)) {
    pool(tile, stream);
    return;
  }
  for (size_t i = missed.first; i < missed.last; ++i) {
    const int64_t position = finder_.misses(missed.thread)[i].slot - slots;
    for (int64_t f = tile.first_feature; f < tile.last_feature; ++f) {
      const int64_t b = position - plan.packed_feature[f] * batch.batch_size;
      if (b >= tile.begin && b < tile.end) pool({f, f + 1, b, b + 1}, false);
    }
  }
}

Status PooledLookups::look_up(const PoolingPlan& plan, const PackedKeys& given, bool insert, float* out, Lookup* lookup) {
  if (const Status status = copies_.take(plan, given, lookup); status != Status::kOk) return status;
  const PackedKeys batch = lookup->batch();
  const std::vector<Tile> tiles = tiles_of(plan, batch);
  const bool stream = static_cast<size_t>(batch.batch_size * plan.stride) * sizeof(float) > kStreamBytes;
  lookup->erase_version = rows_.slots.erase_version();
  lookup->num_defaults = rows_.tables.num_defaults;
  uint32_t* const slots = lookup->slots;
  tile_misses_.resize(tiles.size());
  const bool is_plain = batch.is_one_hot && batch.weights == nullptr &&
                        std::find(plan.pooling, plan.pooling + plan.num_features, Pooling::kSequence) ==
                            plan.pooling + plan.num_features;
  rows_.pool.run(static_cast<int64_t>(tiles.size()), [&](int64_t number, int thread) {
    const std::vector<Miss>& misses = finder_.misses(thread);
    const Tile& tile = tiles[number];
    TileMisses& missed = tile_misses_[number];
    missed = {thread, is_plain && tile.end - tile.begin >= KeyFinder::kMinRun, misses.size(), 0};
    BatchCopies::take_keys(plan, batch, given.keys, tile, lookup->keys);
    if (missed.others_are_pooled) {
      look_up_tile(plan, batch, tile, slots, stream, out, thread);
    } else {
      finder_.find_tile(plan, batch, tile, slots, thread);
    }
    missed.last = misses.size();
    if (insert && missed.first != missed.last) return;
    for (size_t i = missed.first; i < missed.last; ++i) {
      *misses[i].slot = rows_.tables.default_slots[misses[i].table];
    }
    pool_missed(plan, batch, missed, tile, slots, stream, out);
  });
  lookup->num_missing += finder_.num_misses();
  if (!insert || lookup->num_missing == 0) return Status::kOk;
  std::vector<SlotSpan> in_use;
  if (rows_.tables.retains) {
    for (int64_t f = 0; f < plan.num_features; ++f) {
      in_use.push_back({plan.table[f], slots + batch.begin(batch.first_bag(plan, f)), batch.count(plan, f)});
    }
  }
  const Status status = insertion_.insert(false, in_use);
  if (status != Status::kOk) return status;
  lookup->erase_version = rows_.slots.erase_version();
  lookup->num_missing = 0;
  rows_.pool.run(static_cast<int64_t>(tiles.size()), [&](int64_t tile, int) {
    const TileMisses& missed = tile_misses_[tile];
    if (missed.first != missed.last) pool_missed(plan, batch, missed, tiles[tile], slots, stream, out);
  });
  return Status::kOk;
}

void PooledLookups::read(const Lookup& lookup, float* vectors) {
  const PoolingPlan plan = lookup.plan->view();
  const PackedKeys batch = lookup.batch();
  struct Run {
    int64_t feature;
    int64_t first;
    int64_t count;
  };
  constexpr int64_t kMostKeys = 2048;
  std::vector<Run> runs;
  for (int64_t f = 0; f < plan.num_features; ++f) {
    const int64_t begin = batch.begin(batch.first_bag(plan, f)), last = begin + batch.count(plan, f);
    for (int64_t first = begin; first < last; first += kMostKeys) {
      runs.push_back({f, first, std::min(kMostKeys, last - first)});
    }
  }
  rows_.pool.run(static_cast<int64_t>(runs.size()), [&](int64_t number, int) {
    // Each key as a bag of its own.
    const Run& run = runs[number];
    const int64_t zero = 0;
    const Pooling pooling = Pooling::kSum;
    const PoolingPlan each{1, &zero, plan.table + run.feature, &pooling, &zero, &zero, int64_t{rows_.layout.dim}, &zero};
    const PackedKeys keys{lookup.keys + run.first, nullptr, run.count, 1, run.count, nullptr, true};
    rows_.kernels.pool(rows_.rows(), each, keys, lookup.slots + run.first, rows_.tables.initializers.data(), {0, 1, 0, run.count}, false,
                  vectors + run.first * int64_t{rows_.layout.dim});
  });
}

}  // namespace penstock
