// What a look-up leaves for its update, and the gradient of one.
#pragma once

#include <cstdint>
#include <memory>

#include "rows/row_kernels.h"
#include "store/shared_plan.h"
#include "system/buffer_pool.h"

namespace penstock {

// What apply_gradients needs of a look-up: where each key's row is, and the batch: copies, so that the caller may do with his
// arrays as he likes. Arrays are by position in the packed keys; only the plan's features are filled.
struct Lookup {
  std::shared_ptr<const SharedPlan> plan;
  uint64_t store = 0;  // number of the one that made it; 0: none yet
  int64_t batch_size = 0;
  int64_t num_features = 0;
  int64_t num_keys = 0;
  uint32_t* slots = nullptr;         // [N]
  int64_t* keys = nullptr;           // [N]
  float* weights = nullptr;          // [N]; null: all 1
  int64_t* offsets = nullptr;        // [F * B + 1]; null: every bag holds one key
  uint64_t erase_version = 0;  // slots hold as long as no row was erased since
  int64_t num_missing = 0;  // keys read without a row (insert == false)
  bool is_applied = false;
  uint32_t num_defaults = 0;  // default rows of the store: the first slots
  std::unique_ptr<BufferPool::Loan> memory;  // of the arrays

  // Rows of what it read, and of its gradient.
  int64_t num_outputs() const { return plan->is_by_key() ? num_keys : batch_size; }

  PackedKeys batch() const {
    return {keys, offsets, batch_size, num_features, num_keys, weights, offsets == nullptr};
  }
};

constexpr uint64_t kMostUpdateKeys = (uint64_t{1} << 31) - 1;  // of all look-ups of one update

struct LookupGradient {
  Lookup* lookup;
  PackedKeys batch;  // the look-up's own
  const float* grad;  // [outputs of the look-up, stride of its plan]
};

// What default rows take, in place of what gradients say of them: those of several stores that hold one table together.
struct DefaultGradients {
  const float* sums;    // [tables, dim]
  const bool* touched;  // [tables] whether there is any; other default rows take no step
};

}  // namespace penstock
