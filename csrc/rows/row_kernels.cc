// Compiled once per instruction set with PENSTOCK_ISA naming it. Nothing here may instantiate a template or inline
// function that another translation unit shares: the linker would keep one copy, perhaps of a set the machine lacks.
#include "rows/row_kernels.h"

#include <cstring>

#include "rows/lanes.h"
#include "rows/narrow_lanes.h"
#include "rows/optimizer_rules.h"
#include "rows/probe.h"

namespace penstock {
namespace PENSTOCK_ISA {
namespace {

// --- kernels -----------------------------------------------------------------------------------------------------------

int64_t find(const IndexView& index, const Rows& rows, const uint64_t* keys, const uint32_t* tables, int64_t count,
             uint32_t* slots) {
  return probe<false>(rows, keys, TableOfEach{index, tables}, count, rows.value_bytes, slots, [](int64_t, const void*) {});
}

int64_t find_run(const IndexView& index, const Rows& rows, const uint64_t* keys, uint32_t table, int64_t count,
                 uint32_t* slots) {
  return probe<false>(rows, keys, OneTable(index, table), count, rows.value_bytes, slots, [](int64_t, const void*) {});
}

template <ValueType kType, typename S>
inline void fill_initial(const S& shape, const Initializer& init, uint64_t key,
                         typename Stored<kType>::Element* value) {
  const uint64_t seed = row_seed(init, key);
  for (int column = 0; column < shape.dim(); ++column) {
    value[column] = Stored<kType>::of(initial_value(init, seed, static_cast<uint32_t>(column)));
  }
}

// Where the vectors of a feature and sample go.
struct Target {
  float* columns;
  bool stream;

  template <typename S>
  [[gnu::always_inline]] void write(const S& shape, int64_t position, int chunk, Lanes lanes) const {
    float* const vector = columns + position * shape.dim();
    if (stream) {
      store_streaming(shape, vector, chunk, lanes);
    } else {
      store(shape, vector, chunk, lanes);
    }
  }
};

template <int D, ValueType kType>
int64_t look_up_run(const IndexView& index, const Rows& rows, const uint64_t* keys, uint32_t table, int64_t count,
                    uint32_t* slots, int64_t stride, bool stream, float* out) {
  const Shape<D> shape(rows.dim);
  using Element = typename Stored<kType>::Element;
  const auto copy = [&](int64_t i, const void* place) __attribute__((always_inline)) {
    const Element* const row = static_cast<const Element*>(place);
    const Target target{out + i * stride, stream};
    // The sum of a bag of one: 0 + -0 is 0.
    for (int c = 0; c < num_chunks(shape); ++c) target.write(shape, 0, c, Lanes{} + Stored<kType>::load(shape, row, c));
  };
  const uint32_t value_bytes = D == 0 ? rows.value_bytes : static_cast<uint32_t>(D * sizeof(Element));
  const int64_t absent = probe<true>(rows, keys, OneTable(index, table), count, value_bytes, slots, copy);
#if defined(__AVX512F__) || defined(__AVX2__)
  if (stream) _mm_sfence();
#endif
  return absent;
}

// A bag with weights, or a sequence: bag (f, keys [first, last)). Out of line, so that pool() stays what it is without.
template <int D, ValueType kType>
[[gnu::noinline]] void pool_weighted(const Rows& rows, const PoolingPlan& plan, const PackedKeys& batch,
                                     const uint32_t* slots, const Initializer* initializers, int64_t f, int64_t first,
                                     int64_t last, const Target& target) {
  const Shape<D> shape(rows.dim);
  using Element = typename Stored<kType>::Element;
  Element initial[kChunks<D> * kLanes];
  Lanes sum[kChunks<D>];
  const bool is_sequence = plan.pooling[f] == Pooling::kSequence;
  for (int c = 0; c < num_chunks(shape); ++c) sum[c] = Lanes{};
  for (int64_t n = first; n < last; ++n) {
    const Element* row = initial;
    if (slots[n] != kNoSlot) {
      row = static_cast<const Element*>(rows.value(slots[n]));
    } else {
      fill_initial<kType>(shape, initializers[plan.table[f]], static_cast<uint64_t>(batch.keys[n]), initial);
    }
    const float weight = batch.weights == nullptr ? 1.0f : batch.weights[n];
    for (int c = 0; c < num_chunks(shape); ++c) {
      const Lanes weighted = weight * Stored<kType>::load(shape, row, c);
      if (is_sequence) {
        target.write(shape, n - first, c, weighted);
      } else {
        sum[c] += weighted;
      }
    }
  }
  if (is_sequence) {
    for (int64_t position = last - first; position < plan.max_keys[f]; ++position) {
      for (int c = 0; c < num_chunks(shape); ++c) target.write(shape, position, c, Lanes{});
    }
    return;
  }
  const float scale = weighted_bag_scale(plan.pooling[f], batch.weights + first, last - first);
  for (int c = 0; c < num_chunks(shape); ++c) target.write(shape, 0, c, scale == 0.0f ? Lanes{} : sum[c] * scale);
}

template <int D, ValueType kType>
void pool(const Rows& rows, const PoolingPlan& plan, const PackedKeys& batch, const uint32_t* slots,
          const Initializer* initializers, const Tile& tile, bool stream, float* out) {
  const Shape<D> shape(rows.dim);
  using Element = typename Stored<kType>::Element;
  Element initial[kChunks<D> * kLanes];
  Lanes sum[kChunks<D>];
  for (int64_t b = tile.begin; b < tile.end; ++b) {
    for (int64_t f = tile.first_feature; f < tile.last_feature; ++f) {
      const int64_t bag = plan.packed_feature[f] * batch.batch_size + b;
      const int64_t first = batch.begin(bag), last = batch.begin(bag + 1);
      const Target target{out + b * plan.stride + plan.column[f], stream};
      if (batch.weights != nullptr || plan.pooling[f] == Pooling::kSequence) {
        pool_weighted<D, kType>(rows, plan, batch, slots, initializers, f, first, last, target);
        continue;
      }
      for (int c = 0; c < num_chunks(shape); ++c) sum[c] = Lanes{};
      for (int64_t n = first; n < last; ++n) {
        const Element* row = initial;
        if (slots[n] != kNoSlot) {
          row = static_cast<const Element*>(rows.value(slots[n]));
        } else {
          fill_initial<kType>(shape, initializers[plan.table[f]], static_cast<uint64_t>(batch.keys[n]), initial);
        }
        for (int c = 0; c < num_chunks(shape); ++c) sum[c] += Stored<kType>::load(shape, row, c);
      }
      const float scale = bag_scale(plan.pooling[f], last - first);
      if (scale != 1.0f) {
        for (int c = 0; c < num_chunks(shape); ++c) sum[c] *= scale;
      }
      for (int c = 0; c < num_chunks(shape); ++c) target.write(shape, 0, c, sum[c]);
    }
  }
#if defined(__AVX512F__) || defined(__AVX2__)
  if (stream) _mm_sfence();
#endif
}

// Begins a numbering of distinct slots.
inline void forget_numbers(const UpdateScratch& scratch) {
  std::memset(scratch.hash_slots, 0xFF, scratch.hash_size * sizeof(uint64_t));
}

// The number of a slot, by first appearance; raises *unique where the slot is new. That cannot be foreseen, and is no branch.
[[gnu::always_inline]] inline uint32_t number_of(uint64_t slot, const UpdateScratch& scratch, uint32_t* unique) {
  constexpr uint64_t kFree = ~uint64_t{0};
  const uint64_t mask = scratch.hash_size - 1;
  uint64_t place = (slot * kGolden >> 32) & mask;
  uint64_t entry;
  while ((entry = scratch.hash_slots[place]) != kFree && entry >> 32 != slot) place = (place + 1) & mask;
  const bool is_new = entry == kFree;
  const uint32_t number = is_new ? *unique : static_cast<uint32_t>(entry);
  scratch.hash_slots[place] = slot << 32 | number;
  scratch.unique_slot[*unique] = static_cast<uint32_t>(slot);
  *unique += is_new;
  return number;
}

// Numbers the distinct slots and lists each one's occurrences, in order. Returns how many there are; occurrences of number u
// are order[begin[u] .. begin[u + 1]).
inline uint32_t group_by_slot(const Occurrence* occurrences, int64_t count, const UpdateScratch& scratch) {
  forget_numbers(scratch);
  uint32_t unique = 0;
  for (int64_t i = 0; i < count; ++i) {
    scratch.begin[unique] = 0;
    const uint32_t number = number_of(occurrences[i].slot, scratch, &unique);
    ++scratch.begin[number];
    scratch.unique_of[i] = number;
  }
  // Counts become ends, and filling from the back turns the ends into beginnings.
  for (uint32_t u = 1; u < unique; ++u) scratch.begin[u] += scratch.begin[u - 1];
  scratch.begin[unique] = static_cast<uint32_t>(count);
  for (int64_t i = count - 1; i >= 0; --i) {
    scratch.order[--scratch.begin[scratch.unique_of[i]]] = static_cast<uint32_t>(i);
  }
  return unique;
}

// Sum of scale * grad over occurrences order[first .. last) that has the same bits in any order: integers add exactly.
// The unit is the row's largest share times 2^-sum_bits, 31 or more: nothing that fp32 would keep is lost.
template <typename S>
[[gnu::noinline]] void sum_order_free(const S& shape, const Occurrence* occurrences, const uint32_t* first,
                                      const uint32_t* last, int sum_bits, Lanes* sum) {
  float largest = 0.0f;
  bool is_finite = true;
  for (const uint32_t* k = first; k < last; ++k) {
    const Occurrence& occurrence = occurrences[*k];
    for (int i = 0; i < shape.dim(); ++i) {
      const float share = __builtin_fabsf(occurrence.scale * occurrence.grad[i]);
      largest = share > largest ? share : largest;
      is_finite &= share <= 3.4028234e38f;  // false for NaN too
    }
  }
  for (int c = 0; c < num_chunks(shape); ++c) sum[c] = Lanes{} + (is_finite ? 0.0f : __builtin_nanf(""));
  if (largest == 0.0f || !is_finite) return;
  int exponent;
  __builtin_frexpf(largest, &exponent);
  const double to_units = __builtin_ldexp(1.0, sum_bits - exponent);
  const double from_units = __builtin_ldexp(1.0, exponent - sum_bits);
  for (int c = 0; c < num_chunks(shape); ++c) {
    int64_t units[kLanes] = {};
    for (const uint32_t* k = first; k < last; ++k) {
      const Lanes share = occurrences[*k].scale * load(shape, occurrences[*k].grad, c);
      float lane[kLanes];
      std::memcpy(lane, &share, sizeof(lane));
      for (int i = 0; i < kLanes; ++i) units[i] += static_cast<int64_t>(__builtin_rint(lane[i] * to_units));
    }
    float lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<float>(static_cast<double>(units[i]) * from_units);
    std::memcpy(&sum[c], lane, sizeof(lane));
  }
}

// Numbers the distinct slots and sums the gradients of each, in order, into its number's place in scratch.sums: gradients are
// read once and in turn, which for short ones is faster than row by row. Returns how many there are.
template <typename S>
inline uint32_t sum_by_slot(const S& shape, const Occurrence* occurrences, int64_t count, const UpdateScratch& scratch) {
  constexpr int64_t kGradAhead = 24;
  const auto prefetch_grad = [&](int64_t i) __attribute__((always_inline)) {
    prefetch_bytes<0, 3>(occurrences[i].grad, shape.dim() * sizeof(float));
  };
  for (int64_t i = 0; i < count && i < kGradAhead; ++i) prefetch_grad(i);
  forget_numbers(scratch);
  const int chunks = num_chunks(shape);
  Lanes* const sums = reinterpret_cast<Lanes*>(scratch.sums);
  // The sum after the last is 0, so that a slot that is new is added to like any other.
  for (int c = 0; c < chunks; ++c) sums[c] = Lanes{};
  uint32_t unique = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i + kGradAhead < count) prefetch_grad(i + kGradAhead);
    const Occurrence& occurrence = occurrences[i];
    Lanes* const sum = sums + int64_t{number_of(occurrence.slot, scratch, &unique)} * chunks;
    for (int c = 0; c < chunks; ++c) sum[c] += occurrence.scale * load(shape, occurrence.grad, c);
    for (int c = 0; c < chunks; ++c) sums[int64_t{unique} * chunks + c] = Lanes{};
  }
  return unique;
}

// One step of the optimizer on each of the rows slots[0 .. unique); sum_of(u, sum) gives the gradient of slots[u].
template <int D, typename Optimizer, typename SumOf>
[[gnu::always_inline]] inline void update_rows(const Rows& rows, const uint32_t* slots, uint32_t unique, const Hyper& hyper,
                                               uint32_t step_seed, const SumOf& sum_of) {
  constexpr uint32_t kRowAhead = 16;
  const Shape<D> shape(rows.dim);
  // A narrow row is updated as fp32, then rounded: the rules know one type.
  const bool is_narrow = rows.type != ValueType::kFloat32;
  float widened[kChunks<D> * kLanes];
  uint32_t keys[kChunks<D> * kLanes];
  if (is_narrow) {
    for (int column = 0; column < num_chunks(shape) * kLanes; ++column) keys[column] = column_key(step_seed, column);
  }
  // Inlined by force: the compiler deems a function that only prefetches to be without effect, and drops calls of it.
  const auto prefetch_target = [&](uint32_t u) __attribute__((always_inline)) {
    if (is_narrow) {
      prefetch_bytes<1, 3>(rows.value(slots[u]), shape.dim() * sizeof(uint16_t));
    } else {
      prefetch_bytes<1, 3>(rows.value(slots[u]), shape.dim() * sizeof(float));
    }
    prefetch_bytes<1, 3>(rows.state(slots[u]), (rows.state_dim + rows.usage_dim) * sizeof(float));
  };
  for (uint32_t u = 0; u < unique && u < kRowAhead; ++u) prefetch_target(u);
  Lanes grad[kChunks<D>];
  for (uint32_t u = 0; u < unique; ++u) {
    if (u + kRowAhead < unique) prefetch_target(u + kRowAhead);
    sum_of(u, grad);
    const uint32_t slot = slots[u];
    if (hyper.clip_norm > 0.0f) clip(shape, grad, hyper.clip_norm);
    float* value = static_cast<float*>(rows.value(slot));
    if (is_narrow) [[unlikely]] {
      widen_row(shape, rows.type, static_cast<const uint16_t*>(rows.value(slot)), widened);
      value = widened;
    }
    Optimizer::step(shape, value, rows.state(slot), grad, hyper);
    if (hyper.weight_bound > 0.0f) [[unlikely]] bound_row(shape, value, hyper.weight_bound);
    if (is_narrow) [[unlikely]] round_row(shape, rows.type, widened, keys, static_cast<uint16_t*>(rows.value(slot)));
  }
}

template <int D, typename Optimizer>
int64_t update(const Rows& rows, const Occurrence* occurrences, int64_t count, const Hyper& hyper,
               uint32_t step_seed, int sum_bits, const UpdateScratch& scratch) {
  constexpr int kGradAhead = 12;
  const Shape<D> shape(rows.dim);
  if constexpr (D <= static_cast<int>(kMostSummedDim)) {
    if (scratch.sums != nullptr && sum_bits == 0) {
      const uint32_t unique = sum_by_slot(shape, occurrences, count, scratch);
      const Lanes* const sums = reinterpret_cast<const Lanes*>(scratch.sums);
      const auto sum_of = [&](uint32_t u, Lanes* sum) __attribute__((always_inline)) {
        for (int c = 0; c < num_chunks(shape); ++c) sum[c] = sums[int64_t{u} * num_chunks(shape) + c];
      };
      update_rows<D, Optimizer>(rows, scratch.unique_slot, unique, hyper, step_seed, sum_of);
      return unique;
    }
  }
  const uint32_t unique = group_by_slot(occurrences, count, scratch);
  const auto prefetch_grad = [&](int64_t k) __attribute__((always_inline)) {
    prefetch_bytes<0, 3>(occurrences[scratch.order[k]].grad, shape.dim() * sizeof(float));
  };
  for (int64_t k = 0; k < count && k < kGradAhead; ++k) prefetch_grad(k);
  const auto sum_of = [&](uint32_t u, Lanes* sum) __attribute__((always_inline)) {
    const uint32_t first = scratch.begin[u], last = scratch.begin[u + 1];
    if (sum_bits != 0) {
      return sum_order_free(shape, occurrences, scratch.order + first, scratch.order + last, sum_bits, sum);
    }
    for (int c = 0; c < num_chunks(shape); ++c) sum[c] = Lanes{};
    for (uint32_t k = first; k < last; ++k) {
      if (k + kGradAhead < count) prefetch_grad(k + kGradAhead);
      const Occurrence& occurrence = occurrences[scratch.order[k]];
      for (int c = 0; c < num_chunks(shape); ++c) sum[c] += occurrence.scale * load(shape, occurrence.grad, c);
    }
  };
  update_rows<D, Optimizer>(rows, scratch.unique_slot, unique, hyper, step_seed, sum_of);
  return unique;
}

// Adds the gradient of one row to a norm.
template <typename S>
inline void add_to_norm(const S& shape, const Lanes* grad, GradientNorm* norm) {
  if (norm->order == 2.0) return norm->add(sum_of_squares(shape, grad));
  float power = 0.0f;
  const bool is_largest = norm->order == __builtin_inf();
  for (int c = 0; c < num_chunks(shape); ++c) {
    float lane[kLanes];
    std::memcpy(lane, &grad[c], sizeof(lane));
    for (int i = 0; i < width(shape, c); ++i) {
      const float x = __builtin_fabsf(lane[i]);
      if (is_largest) {
        norm->largest = x > norm->largest ? x : norm->largest;
        power += x - x;  // 0, or NaN
      } else {
        power += norm->order == 1.0 ? x : static_cast<float>(__builtin_pow(x, norm->order));
      }
    }
  }
  norm->add(power);
}

template <int D>
void measure(uint32_t dim, const Occurrence* occurrences, int64_t count, int sum_bits, const UpdateScratch& scratch,
             GradientNorm* norm) {
  const Shape<D> shape(dim);
  if constexpr (D <= static_cast<int>(kMostSummedDim)) {
    if (scratch.sums != nullptr && sum_bits == 0) {
      const uint32_t unique = sum_by_slot(shape, occurrences, count, scratch);
      const Lanes* const sums = reinterpret_cast<const Lanes*>(scratch.sums);
      for (uint32_t u = 0; u < unique; ++u) add_to_norm(shape, sums + int64_t{u} * num_chunks(shape), norm);
      return;
    }
  }
  const uint32_t unique = group_by_slot(occurrences, count, scratch);
  Lanes sum[kChunks<D>];
  for (uint32_t u = 0; u < unique; ++u) {
    const uint32_t* const first = scratch.order + scratch.begin[u];
    const uint32_t* const last = scratch.order + scratch.begin[u + 1];
    if (sum_bits != 0) {
      sum_order_free(shape, occurrences, first, last, sum_bits, sum);
    } else {
      for (int c = 0; c < num_chunks(shape); ++c) sum[c] = Lanes{};
      for (const uint32_t* k = first; k < last; ++k) {
        const Occurrence& occurrence = occurrences[*k];
        for (int c = 0; c < num_chunks(shape); ++c) sum[c] += occurrence.scale * load(shape, occurrence.grad, c);
      }
    }
    add_to_norm(shape, sum, norm);
  }
}

void initialize(const Rows& rows, const Initializer& init, uint64_t key, void* value, float* state) {
  const Shape<0> shape(rows.dim);
  switch (rows.type) {
    case ValueType::kFloat32:
      fill_initial<ValueType::kFloat32>(shape, init, key, static_cast<float*>(value));
      break;
    case ValueType::kBFloat16:
      fill_initial<ValueType::kBFloat16>(shape, init, key, static_cast<uint16_t*>(value));
      break;
    case ValueType::kFloat16:
      fill_initial<ValueType::kFloat16>(shape, init, key, static_cast<uint16_t*>(value));
      break;
  }
  for (uint32_t i = 0; i < rows.state_dim; ++i) state[i] = init.state;
}

template <int D, typename Optimizer>
constexpr RowKernels kKernels = {find,
                                find_run,
                                look_up_run<D, ValueType::kFloat32>,
                                pool<D, ValueType::kFloat32>,
                                update<D, Optimizer>,
                                measure<D>,
                                initialize};

template <int D>
RowKernels kernels_of(OptimizerKind optimizer) {
  switch (optimizer) {
    case OptimizerKind::kSgd:
      return kKernels<D, Sgd>;
    case OptimizerKind::kAdagrad:
      return kKernels<D, Adagrad>;
    case OptimizerKind::kRowWiseAdagrad:
      return kKernels<D, RowWiseAdagrad>;
    case OptimizerKind::kAdam:
      return kKernels<D, Adam>;
    case OptimizerKind::kMomentumSgd:
      return kKernels<D, MomentumSgd>;
    case OptimizerKind::kRowWiseAdam:
      return kKernels<D, RowWiseAdam>;
    case OptimizerKind::kFtrl:
      return kKernels<D, Ftrl>;
    case OptimizerKind::kLamb:
      return kKernels<D, Lamb>;
    case OptimizerKind::kAdamW:
      break;
  }
  return kKernels<D, AdamW>;
}

template <int D>
RowKernels kernels_of(ValueType type, OptimizerKind optimizer) {
  RowKernels kernels = kernels_of<D>(optimizer);
  if (type == ValueType::kBFloat16) {
    kernels.look_up_run = look_up_run<D, ValueType::kBFloat16>;
    kernels.pool = pool<D, ValueType::kBFloat16>;
  }
  if (type == ValueType::kFloat16) {
    kernels.look_up_run = look_up_run<D, ValueType::kFloat16>;
    kernels.pool = pool<D, ValueType::kFloat16>;
  }
  return kernels;
}

}  // namespace

RowKernels row_kernels(uint32_t dim, ValueType type, OptimizerKind optimizer) {
  switch (dim) {
    case 16:
      return kernels_of<16>(type, optimizer);
#ifndef PENSTOCK_FEW_KERNELS
    case 8:
      return kernels_of<8>(type, optimizer);
    case 32:
      return kernels_of<32>(type, optimizer);
    case 64:
      return kernels_of<64>(type, optimizer);
    case 128:
      return kernels_of<128>(type, optimizer);
#endif
    default:
      return kernels_of<0>(type, optimizer);
  }
}

}  // namespace PENSTOCK_ISA
}  // namespace penstock
