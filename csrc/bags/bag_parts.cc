// A feature is one task: its keys are gone through twice, once to see whose they are, once to lay them out.
#include "bags/bag_parts.h"

#include <algorithm>
#include <bit>

#include "index/hashing.h"

namespace penstock {
namespace {

constexpr int64_t kMostSampled = 4096;

template <typename Length>
void split_feature(const PoolingPlan& plan, const PackedKeys& batch, const OwnedKeys& owned, const BagParts& parts, int64_t f) {
  const int64_t ranks = static_cast<int64_t>(owned.counts.size()) / plan.num_features;
  std::vector<int64_t> next(ranks), bag_keys(ranks);
  for (int64_t r = 0; r < ranks; ++r) {
    for (int64_t before = 0; before < f; ++before) next[r] += owned.counts[r * plan.num_features + before];
  }
  const int64_t first_bag = batch.first_bag(plan, f);
  const uint16_t* owner = owned.owners.data() + owned.first[f];
  for (int64_t b = 0; b < batch.batch_size; ++b) {
    const int64_t begin = batch.begin(first_bag + b), end = batch.begin(first_bag + b + 1);
    for (int64_t n = begin; n < end; ++n, ++owner) {
      const int64_t place = next[*owner]++;
      parts.keys[*owner][place] = batch.keys[n];
      if (batch.weights != nullptr) parts.weights[*owner][place] = batch.weights[n];
      ++bag_keys[*owner];
    }
    for (int64_t r = 0; r < ranks; ++r) {
      const int64_t place = parts.places[r * plan.num_features + f];
      if (place < 0) continue;
      const int64_t bag = place * batch.batch_size + b;
      if (r == parts.self) {
        parts.offsets[bag + 1] = next[r];
      } else {
        reinterpret_cast<Length*>(parts.lengths[r])[bag] = static_cast<Length>(bag_keys[r]);
      }
      bag_keys[r] = 0;
    }
  }
}

}  // namespace

OwnedKeys owned_keys(ThreadPool& pool, const PoolingPlan& plan, const PackedKeys& batch, const Owners& owners) {
  const int64_t features = plan.num_features;
  OwnedKeys out;
  out.first.resize(features + 1);
  for (int64_t f = 0; f < features; ++f) out.first[f + 1] = out.first[f] + batch.count(plan, f);
  const int64_t total = out.first[features];
  out.owners.resize(total);
  out.counts.resize(owners.num_ranks * features);
  // Keys are sampled by their hash, so that all occurrences of one are there or none.
  const uint64_t rate = std::bit_floor(static_cast<uint64_t>(total / kMostSampled + 1));
  std::vector<std::vector<uint64_t>> sampled(features);
  pool.run(features, [&](int64_t f, int) {
    const uint64_t word = static_cast<uint64_t>(owners.words[plan.table[f]]);
    const int64_t whole = owners.of_table[plan.table[f]];
    const int64_t* const keys = batch.keys + batch.begin(batch.first_bag(plan, f));
    uint16_t* const owner = out.owners.data() + out.first[f];
    std::vector<int64_t> counts(owners.num_ranks);
    for (int64_t i = 0, count = out.first[f + 1] - out.first[f]; i < count; ++i) {
      const uint64_t mixed = mix64(static_cast<uint64_t>(keys[i]) ^ word);
      const int64_t rank = whole >= 0 ? whole : owners.of_bucket[mixed >> Owners::kBucketShift];
      owner[i] = static_cast<uint16_t>(rank);
      ++counts[rank];
      // Equal keys of two tables differ: their words do.
      if ((mixed & (rate - 1)) == 0) sampled[f].push_back(mixed);
    }
    for (int64_t r = 0; r < owners.num_ranks; ++r) out.counts[r * features + f] = counts[r];
  });
  std::vector<uint64_t> all;
  for (const std::vector<uint64_t>& some : sampled) all.insert(all.end(), some.begin(), some.end());
  std::sort(all.begin(), all.end());
  out.distinct = static_cast<int64_t>(rate) * (std::unique(all.begin(), all.end()) - all.begin());
  return out;
}

void split_bags(ThreadPool& pool, const PoolingPlan& plan, const PackedKeys& batch, const OwnedKeys& owned, const BagParts& parts) {
  parts.offsets[0] = 0;
  pool.run(plan.num_features, [&](int64_t f, int) {
    switch (parts.length_bytes) {
      case 1: return split_feature<uint8_t>(plan, batch, owned, parts, f);
      case 2: return split_feature<uint16_t>(plan, batch, owned, parts, f);
      default: return split_feature<uint32_t>(plan, batch, owned, parts, f);
    }
  });
}

void bag_scales(ThreadPool& pool, const PoolingPlan& plan, const PackedKeys& batch, float* scales) {
  pool.run(plan.num_features, [&](int64_t f, int) {
    for (int64_t b = 0; b < batch.batch_size; ++b) {
      const int64_t bag = batch.first_bag(plan, f) + b;
      const int64_t begin = batch.begin(bag), size = batch.begin(bag + 1) - begin;
      scales[b * plan.num_features + f] = batch.weights == nullptr
                                              ? bag_scale(plan.pooling[f], size)
                                              : weighted_bag_scale(plan.pooling[f], batch.weights + begin, size);
    }
  });
}

}  // namespace penstock
