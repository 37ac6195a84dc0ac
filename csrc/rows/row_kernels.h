// The inner loops over rows. Compiled once per instruction set (row_kernels.cc), chosen when a store is opened.
//
// The small member functions are always inlined: one copy for all instruction sets must not exist.
// Every set computes the same bits: lanes are fixed at 16, sums run in a fixed order, multiply-add is never fused.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "index/hashing.h"
#include "index/index.h"
#include "rows/gradient_norm.h"
#include "rows/narrow.h"

namespace penstock {

enum class OptimizerKind : int32_t {
  kSgd = 0,
  kAdagrad = 1,
  kRowWiseAdagrad = 2,
  kAdam = 3,
  kMomentumSgd = 4,
  kRowWiseAdam = 5,
  kFtrl = 6,
  kLamb = 7,
  kAdamW = 8,
};

// Floats of state of a row, behind which its marks of use lie.
constexpr uint32_t state_dim_of(OptimizerKind optimizer, uint32_t dim) {
  switch (optimizer) {
    case OptimizerKind::kSgd:
      return 0;
    case OptimizerKind::kRowWiseAdagrad:
      return 1;
    case OptimizerKind::kAdagrad:
    case OptimizerKind::kMomentumSgd:
      return dim;
    case OptimizerKind::kRowWiseAdam:
      return dim + 1;
    case OptimizerKind::kAdam:
    case OptimizerKind::kFtrl:
    case OptimizerKind::kLamb:
    case OptimizerKind::kAdamW:
      break;
  }
  return 2 * dim;
}

constexpr uint32_t kMostDim = 4096;

// Settings of one table's optimizer at one step; those that its rule has no use for are 0.
struct Hyper {
  float learning_rate;  // with the schedule's factor; for Adam also with the bias corrections
  float weight_decay;   // for AdamW times the learning rate
  float clip_norm;  // largest L2 norm of a row's gradient; 0: any
  float eps;
  float momentum;
  float one_minus_beta1;
  float one_minus_beta2;
  float l1;
  float inverse_bias1;
  float inverse_bias2;
  float weight_bound;  // largest absolute value of a row; 0: any
};

// Rows by slot, in two arrays: a look-up touches values alone, and a value of 16 floats is one cache line.
struct Rows {
  char* values;
  float* states;
  uint32_t dim;
  uint32_t state_dim;
  uint32_t usage_dim;  // marks of use behind the state: time of the last use, number of uses
  ValueType type;        // of the values; states are fp32
  uint32_t value_bytes;  // of a row's values

  [[gnu::always_inline]] void* value(uint32_t slot) const { return values + size_t{value_bytes} * slot; }
  [[gnu::always_inline]] float* state(uint32_t slot) const { return states + size_t{state_dim + usage_dim} * slot; }
  uint32_t* usage(uint32_t slot) const { return reinterpret_cast<uint32_t*>(state(slot) + state_dim); }
};

enum class Pooling : uint8_t { kSum = 0, kMean = 1, kSqrtN = 2, kSequence = 3 };

// Factor of the sum of a bag of `size` rows.
[[gnu::always_inline]] static inline float bag_scale(Pooling pooling, int64_t size) {
  if (pooling == Pooling::kSum || size < 2) return 1.0f;
  const float count = static_cast<float>(size);
  return 1.0f / (pooling == Pooling::kMean ? count : __builtin_sqrtf(count));
}

// Factor of the weighted sum of a bag; 0 where its divisor is 0 (or so small that its inverse is not finite). Where all
// weights are 1 it has the bits of bag_scale. The divisor is summed in fp64: weights of both signs nearly cancel out.
[[gnu::always_inline]] static inline float weighted_bag_scale(Pooling pooling, const float* weights, int64_t size) {
  if (pooling != Pooling::kMean && pooling != Pooling::kSqrtN) return 1.0f;
  double total = 0.0;
  for (int64_t n = 0; n < size; ++n) {
    const double weight = weights[n];
    total += pooling == Pooling::kMean ? weight : weight * weight;
  }
  const float divisor = static_cast<float>(pooling == Pooling::kMean ? total : __builtin_sqrt(total));
  return __builtin_fabsf(divisor) < 0x1p-126f ? 0.0f : 1.0f / divisor;
}

// The features of a batch that one store serves; [F] arrays.
struct PoolingPlan {
  int64_t num_features;
  const int64_t* packed_feature;  // which feature of the packed batch
  const uint32_t* table;
  const Pooling* pooling;
  const int64_t* max_keys;  // positions of a sequence, each of dim columns; 0 for the other poolings
  const int64_t* column;  // first column of the output
  int64_t stride;         // columns of the output
  const int64_t* by_table;  // the plan's features, those of one table side by side, in order
  const int64_t* samples = nullptr;  // bags of each feature; null: as many as the batch has samples
};

// A packed batch of B samples: bag (f, b) holds keys[offsets[f * B + b] .. offsets[f * B + b + 1]).
struct PackedKeys {
  const int64_t* keys;
  const int64_t* offsets;
  int64_t batch_size;
  int64_t num_features;  // of the packed batch, served by this store or not
  int64_t num_keys;
  const float* weights = nullptr;  // [num_keys] factor of each key's row; null: all 1
  bool is_one_hot = false;  // every bag holds one key, so offsets[i] == i and need not be read

  [[gnu::always_inline]] int64_t num_bags() const { return num_features * batch_size; }
  [[gnu::always_inline]] int64_t begin(int64_t bag) const { return is_one_hot ? bag : offsets[bag]; }

  // Of a feature of a plan: its first bag, its bags and its keys.
  int64_t first_bag(const PoolingPlan& plan, int64_t feature) const { return plan.packed_feature[feature] * batch_size; }
  int64_t samples(const PoolingPlan& plan, int64_t feature) const {
    return plan.samples == nullptr ? batch_size : plan.samples[feature];
  }
  int64_t count(const PoolingPlan& plan, int64_t feature) const {
    const int64_t bag = first_bag(plan, feature);
    return begin(bag + samples(plan, feature)) - begin(bag);
  }
};

// A rectangle of a batch: features [first_feature, last_feature) of the plan, samples [begin, end).
struct Tile {
  int64_t first_feature;
  int64_t last_feature;
  int64_t begin;
  int64_t end;
};

// One occurrence of a row in a batch: scale * grad[0..dim) is its share of the row's gradient.
struct Occurrence {
  const float* grad;
  uint32_t slot;
  float scale;
};

// Gradients of up to so many columns are summed in the order in which they come, longer ones row by row: their sums would not
// stay in the caches. The bits are the same.
constexpr uint32_t kMostSummedDim = 32;

// Bits of a share in sums that are free of the order, of an update of `keys` keys in all: 2^62 / 2^40 = 2^22 of them sum up
// without overflow, each twice as many take a bit. The same in penstock/kernels/update/occurrences.py.
constexpr int sum_bits_of(uint64_t keys) {
  int bits = 40;
  for (uint64_t most = uint64_t{1} << 22; most < keys; most *= 2) --bits;
  return bits;
}

// Working memory of update(); the caller sizes it for `count` occurrences.
struct UpdateScratch {
  uint64_t* hash_slots;   // [hash_size] power of two >= 2 * count
  uint32_t* unique_of;    // [count]
  uint32_t* unique_slot;  // [count]
  uint32_t* begin;        // [count + 1]
  uint32_t* order;        // [count]
  uint64_t hash_size;
  float* sums;  // [count + 1, dim rounded up to 16], at a multiple of 64 bytes; null: too many, or above kMostSummedDim
};

struct RowKernels {
  // Finds keys[i] of tables[i], i < count; slots[i] = kNoSlot where absent. Prefetches the values of the rows found.
  // Returns the number of absent ones.
  int64_t (*find)(const IndexView& index, const Rows& rows, const uint64_t* keys, const uint32_t* tables, int64_t count,
                  uint32_t* slots);

  // The same for keys of one table.
  int64_t (*find_run)(const IndexView& index, const Rows& rows, const uint64_t* keys, uint32_t table, int64_t count,
                      uint32_t* slots);

  // The same, and what pool() makes of a bag of one key, without a weight, into out [count, stride] for those with a row.
  int64_t (*look_up_run)(const IndexView& index, const Rows& rows, const uint64_t* keys, uint32_t table, int64_t count,
                         uint32_t* slots, int64_t stride, bool stream, float* out);

  // Pools a tile into out [B, stride]; a key without a row reads as its initial value.
  void (*pool)(const Rows& rows, const PoolingPlan& plan, const PackedKeys& batch, const uint32_t* slots,
               const Initializer* initializers, const Tile& tile, bool stream, float* out);

  // Sums the gradients of equal slots, in order, and applies one optimizer step to each row; all are of one table.
  // Returns the number of rows updated. sum_bits: in fixed point of so many bits, in which sums have the same bits in any
  // order (see sum_bits_of); 0: in fp32. The step's seed is that of narrow.h.
  int64_t (*update)(const Rows& rows, const Occurrence* occurrences, int64_t count, const Hyper& hyper,
                    uint32_t step_seed, int sum_bits, const UpdateScratch& scratch);

  // Sums the gradients of equal slots as update() does, and adds the sum of each to the norm.
  void (*measure)(uint32_t dim, const Occurrence* occurrences, int64_t count, int sum_bits, const UpdateScratch& scratch,
                  GradientNorm* norm);

  // Writes the first value, as rows store it, and state of a row.
  void (*initialize)(const Rows& rows, const Initializer& init, uint64_t key, void* value, float* state);
};

// Kernels for the best instruction set of this machine, but for none above `most` if it is not empty; `isa` is its name.
// Dim, type and optimizer are fixed per store.
RowKernels select_row_kernels(uint32_t dim, ValueType type, OptimizerKind optimizer, std::string_view most,
                              const char** isa);

namespace isa_generic {
RowKernels row_kernels(uint32_t dim, ValueType type, OptimizerKind optimizer);
}
namespace isa_avx2 {
RowKernels row_kernels(uint32_t dim, ValueType type, OptimizerKind optimizer);
}
namespace isa_avx512 {
RowKernels row_kernels(uint32_t dim, ValueType type, OptimizerKind optimizer);
}

}  // namespace penstock
