// Copies of batches for look-ups: the caller's arrays are looked at but once, and checked as copies.
#pragma once

#include <memory>

#include "store/lookup.h"
#include "system/buffer_pool.h"
#include "system/thread_pool.h"
#include "tables/status.h"

namespace penstock {

class BatchCopies {
 public:
  explicit BatchCopies(ThreadPool& pool);

  // Makes the look-up's arrays, and copies all but the keys. Throws bad_alloc.
  Status take(const PoolingPlan& plan, const PackedKeys& given, Lookup* lookup);
  // Copies the keys of a tile.
  static void take_keys(const PoolingPlan& plan, const PackedKeys& batch, const int64_t* given, const Tile& tile,
                        int64_t* keys);

 private:
  bool is_one_hot(const PackedKeys& given);
  Status take_offsets(const PackedKeys& given, int64_t* offsets);
  bool take_weights(const PackedKeys& given, float* weights);

  ThreadPool& pool_;
  std::shared_ptr<BufferPool> memory_;
};

}  // namespace penstock
