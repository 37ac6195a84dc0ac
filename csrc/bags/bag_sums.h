// Pooling of vectors that are in no store, and its gradient: rows came from elsewhere, by number.
#pragma once

#include <cstdint>

#include "rows/row_kernels.h"
#include "system/thread_pool.h"

namespace penstock {

class BagSums {
 public:
  BagSums(uint32_t dim, int num_threads);

  // What a store's look-up would make of rows [n, dim]: the key at place i of the batch has row numbers[i]. Keys of features
  // that the plan does not serve are not looked at. out: [B, plan.stride].
  void pool(const PoolingPlan& plan, const PackedKeys& batch, const uint32_t* numbers, const float* rows, float* out);

  // Gradients of the rows, into sums [count, dim]: of each the sum of its keys' shares of grad [B, plan.stride], in the order
  // of the batch, so that no number of threads changes a bit.
  void sum(const PoolingPlan& plan, const PackedKeys& batch, const uint32_t* numbers, const float* grad, int64_t count,
           float* sums);

  uint32_t dim() const { return dim_; }
  ThreadPool& threads() { return pool_; }

 private:
  const uint32_t dim_;
  ThreadPool pool_;
  RowKernels kernels_;
};

}  // namespace penstock
