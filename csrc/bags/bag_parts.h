// Bags divided among the ranks that own their keys: what each of them sums up for the others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "rows/row_kernels.h"
#include "system/thread_pool.h"

namespace penstock {

// Whose a key is: see penstock/embedding/sharded/shard_map.py.
struct Owners {
  static constexpr int kBucketShift = 52;  // FORMAT
  static constexpr size_t kBuckets = 4096;

  const int64_t* words;      // of each table
  const int64_t* of_bucket;  // [kBuckets] ranks
  const int64_t* of_table;   // ranks of whole tables; -1: by bucket
  int64_t num_ranks;
};

// Keys [n] of the features of a plan, feature by feature, told apart by owner.
struct OwnedKeys {
  std::vector<uint16_t> owners;  // [n]
  std::vector<int64_t> first;    // [features + 1]: where the keys of each begin among the n
  std::vector<int64_t> counts;   // [ranks, features]
  int64_t distinct = 0;          // about how many of the keys differ, within their tables
};

constexpr int64_t kMostRanks = int64_t{1} << 16;

OwnedKeys owned_keys(ThreadPool& pool, const PoolingPlan& plan, const PackedKeys& batch, const Owners& owners);

// Where the part of each rank goes; arrays [ranks]. Keys and bags are feature by feature.
struct BagParts {
  int64_t** keys;
  float** weights;         // null: there are none
  unsigned char** lengths;  // [features served, samples] keys of each bag, little-endian in `length_bytes`; null for `self`
  int length_bytes;        // 1, 2 or 4
  const int64_t* places;   // [ranks, features]: where a feature is among those that a rank serves; -1: it has no key of it
  int64_t self;            // its bags have offsets instead
  int64_t* offsets;        // [features served * samples + 1]
};

void split_bags(ThreadPool& pool, const PoolingPlan& plan, const PackedKeys& batch, const OwnedKeys& owned, const BagParts& parts);

// Factor of each bag's sum, [samples, features].
void bag_scales(ThreadPool& pool, const PoolingPlan& plan, const PackedKeys& batch, float* scales);

}  // namespace penstock
