// Offsets, weights and keys of a batch, copied and checked by all threads.
#include "store/batch_copies.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>

namespace penstock {
namespace {

constexpr float kLargestFloat = std::numeric_limits<float>::max();
constexpr int64_t kBagsPerTask = 1 << 15;
constexpr int64_t kKeysPerTask = 1 << 16;
constexpr size_t kMaxIdleBytes = size_t{256} << 20;

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

BatchCopies::BatchCopies(ThreadPool& pool) : pool_(pool), memory_(std::make_shared<BufferPool>(kMaxIdleBytes)) {}

// Offsets are looked at before they are copied; whether they are right is found of the copies, which nobody else can change.
bool BatchCopies::is_one_hot(const PackedKeys& given) {
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

Status BatchCopies::take_offsets(const PackedKeys& given, int64_t* offsets) {
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

bool BatchCopies::take_weights(const PackedKeys& given, float* weights) {
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

void BatchCopies::take_keys(const PoolingPlan& plan, const PackedKeys& batch, const int64_t* given, const Tile& tile,
                          int64_t* keys) {
  for (int64_t f = tile.first_feature; f < tile.last_feature; ++f) {
    const int64_t bag = plan.packed_feature[f] * batch.batch_size;
    const int64_t first = batch.begin(bag + tile.begin), last = batch.begin(bag + tile.end);
    std::copy(given + first, given + last, keys + first);
  }
}

// Makes the look-up's arrays, and copies all but the keys. Where there are no weights there is no array for them, nor for
// offsets where every bag has one key.
Status BatchCopies::take(const PoolingPlan& plan, const PackedKeys& given, Lookup* lookup) {
  const bool has_offsets = !given.is_one_hot && !is_one_hot(given), has_weights = given.weights != nullptr;
  const size_t keys = static_cast<size_t>(given.num_keys), offsets = has_offsets ? given.num_bags() + 1 : 0;
  const size_t key_bytes = sizeof(int64_t) + sizeof(uint32_t) + (has_weights ? sizeof(float) : 0);
  lookup->memory = memory_->take(keys * key_bytes + offsets * sizeof(int64_t));
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

}  // namespace penstock
