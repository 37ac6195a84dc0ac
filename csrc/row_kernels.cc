// Compiled once per instruction set with PENSTOCK_ISA naming it. Nothing here may instantiate a template or inline
// function that another translation unit shares: the linker would keep one copy, perhaps of a set the machine lacks.
#include "row_kernels.h"

#include <cmath>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef PENSTOCK_ISA
#error "PENSTOCK_ISA must name the namespace of this build"
#endif

namespace penstock {
namespace PENSTOCK_ISA {
namespace {

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

// Dim known to the compiler (D > 0) or at run time (D == 0).
template <int D>
struct Shape {
  explicit Shape(uint32_t) {}
  static constexpr int dim() { return D; }
};
template <>
struct Shape<0> {
  explicit Shape(uint32_t dim) : dim_(static_cast<int>(dim)) {}
  int dim() const { return dim_; }
  int dim_;
};

// Lanes that a run-time dim can need; config allows 4096 columns.
constexpr int kMaxChunks = 4096 / kLanes;
template <int D>
constexpr int kChunks = D == 0 ? kMaxChunks : (D + kLanes - 1) / kLanes;

template <typename S>
inline int num_chunks(const S& shape) {
  return (shape.dim() + kLanes - 1) / kLanes;
}

template <typename S>
inline int width(const S& shape, int chunk) {
  const int left = shape.dim() - chunk * kLanes;
  return left < kLanes ? left : kLanes;
}

// Columns beyond the dim read as 0.
template <typename S>
inline Lanes load(const S& shape, const float* row, int chunk) {
  Lanes lanes = {};
  if (width(shape, chunk) == kLanes) {
    std::memcpy(&lanes, row + chunk * kLanes, sizeof(Lanes));
  } else {
    std::memcpy(&lanes, row + chunk * kLanes, width(shape, chunk) * sizeof(float));
  }
  return lanes;
}

template <typename S>
inline void store(const S& shape, float* row, int chunk, Lanes lanes) {
  if (width(shape, chunk) == kLanes) {
    std::memcpy(row + chunk * kLanes, &lanes, sizeof(Lanes));
  } else {
    std::memcpy(row + chunk * kLanes, &lanes, width(shape, chunk) * sizeof(float));
  }
}

// Writes past the caches where the row is whole cache lines; else an ordinary store.
template <typename S>
inline void store_streaming(const S& shape, float* row, int chunk, Lanes lanes) {
#if defined(__AVX512F__)
  if (width(shape, chunk) == kLanes && reinterpret_cast<uintptr_t>(row) % 64 == 0) {
    __m512 value;
    std::memcpy(&value, &lanes, sizeof(value));
    _mm512_stream_ps(row + chunk * kLanes, value);
    return;
  }
#elif defined(__AVX2__)
  if (width(shape, chunk) == kLanes && reinterpret_cast<uintptr_t>(row) % 32 == 0) {
    __m256 half[2];
    std::memcpy(half, &lanes, sizeof(half));
    _mm256_stream_ps(row + chunk * kLanes, half[0]);
    _mm256_stream_ps(row + chunk * kLanes + 8, half[1]);
    return;
  }
#endif
  store(shape, row, chunk, lanes);
}

inline Lanes square_root(Lanes x) {
  float lane[kLanes];
  std::memcpy(lane, &x, sizeof(lane));
  for (int i = 0; i < kLanes; ++i) lane[i] = __builtin_sqrtf(lane[i]);
  std::memcpy(&x, lane, sizeof(lane));
  return x;
}

// Fixed tree, so that all instruction sets and dims add in one order.
inline float horizontal_sum(Lanes x) {
  float lane[kLanes];
  std::memcpy(lane, &x, sizeof(lane));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

template <int kWrite, int kLocality>
[[gnu::always_inline]] inline void prefetch_floats(const float* first, size_t count) {
  const char* const begin = reinterpret_cast<const char*>(first);
  const size_t bytes = count * sizeof(float);
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(begin + line, kWrite, kLocality);
  // Floats that do not fill lines may reach into one more.
  if (bytes % 64 != 0) __builtin_prefetch(begin + bytes - 1, kWrite, kLocality);
}

// --- optimizers: one struct each; step() updates one row -----------------------------------------------------------------

struct Sgd {
  template <typename S>
  static void step(const S& shape, float* value, float*, const Lanes* grad, const Hyper& h) {
    for (int c = 0; c < num_chunks(shape); ++c) {
      const Lanes w = load(shape, value, c);
      store(shape, value, c, w - h.learning_rate * (grad[c] + h.weight_decay * w));
    }
  }
};

struct Adagrad {
  template <typename S>
  static void step(const S& shape, float* value, float* state, const Lanes* grad, const Hyper& h) {
    float* const sum = state;
    for (int c = 0; c < num_chunks(shape); ++c) {
      const Lanes w = load(shape, value, c);
      const Lanes g = grad[c] + h.weight_decay * w;
      const Lanes s = load(shape, sum, c) + g * g;
      store(shape, sum, c, s);
      store(shape, value, c, w - h.learning_rate * g / (square_root(s) + h.eps));
    }
  }
};

struct RowWiseAdagrad {
  template <typename S>
  static void step(const S& shape, float* value, float* state, const Lanes* grad, const Hyper& h) {
    Lanes squares = {};
    for (int c = 0; c < num_chunks(shape); ++c) {
      const Lanes g = grad[c] + h.weight_decay * load(shape, value, c);
      squares += g * g;
    }
    float& sum = *state;
    sum += horizontal_sum(squares) / static_cast<float>(shape.dim());
    const float factor = h.learning_rate / (__builtin_sqrtf(sum) + h.eps);
    for (int c = 0; c < num_chunks(shape); ++c) {
      const Lanes w = load(shape, value, c);
      store(shape, value, c, w - factor * (grad[c] + h.weight_decay * w));
    }
  }
};

struct Adam {
  template <typename S>
  static void step(const S& shape, float* value, float* state, const Lanes* grad, const Hyper& h) {
    float* const mean = state;
    float* const variance = mean + shape.dim();
    for (int c = 0; c < num_chunks(shape); ++c) {
      const Lanes w = load(shape, value, c);
      const Lanes g = grad[c] + h.weight_decay * w;
      const Lanes m = h.beta1 * load(shape, mean, c) + h.one_minus_beta1 * g;
      const Lanes v = h.beta2 * load(shape, variance, c) + h.one_minus_beta2 * (g * g);
      store(shape, mean, c, m);
      store(shape, variance, c, v);
      store(shape, value, c, w - h.learning_rate * m / (square_root(v) + h.eps));
    }
  }
};

// --- kernels -----------------------------------------------------------------------------------------------------------

int64_t find(const IndexView& index, const Rows& rows, const uint64_t* keys, const uint32_t* tables, int64_t count,
             uint32_t* slots) {
  constexpr int kAhead = 16;  // probes in flight: about as many as a core has line fill buffers
  const Entry* home[kAhead];
  const auto begin = [&](int64_t i) {
    const uint64_t hash = index.hash(keys[i], tables[i]);
    const Entry* const entry = index.shard(hash) + index.home(hash);
    __builtin_prefetch(entry, 0, 3);
    home[i % kAhead] = entry;
  };
  const int64_t ahead = count < kAhead ? count : kAhead;
  for (int64_t i = 0; i < ahead; ++i) begin(i);
  int64_t absent = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Entry* entry = home[i % kAhead];
    if (i + kAhead < count) begin(i + kAhead);
    const uint64_t key = keys[i];
    const uint64_t table = tables[i];
    uint32_t slot;
    if (entry->key == key && entry->meta >> 48 == table) {
      slot = entry->slot();
    } else {
      const Entry* const shard = index.shard(index.hash(key, tables[i]));
      for (;;) {
        if (entry->is_empty()) {
          slot = kNoSlot;
          break;
        }
        if (++entry == shard + index.capacity) entry = shard;
        if (entry->key == key && entry->meta >> 48 == table) {
          slot = entry->slot();
          break;
        }
      }
    }
    slots[i] = slot;
    if (slot == kNoSlot) {
      ++absent;
    } else {
      prefetch_floats<0, 2>(rows.value(slot), rows.dim);
    }
  }
  return absent;
}

template <typename S>
inline void fill_initial(const S& shape, const Initializer& init, uint64_t key, float* value) {
  const uint64_t seed = row_seed(init, key);
  for (int column = 0; column < shape.dim(); ++column) {
    value[column] = initial_value(init, seed, static_cast<uint32_t>(column));
  }
}

template <int D>
void pool(const Rows& rows, const PoolingPlan& plan, const PackedKeys& batch, const uint32_t* slots,
          const Initializer* initializers, const Tile& tile, bool stream, float* out) {
  const Shape<D> shape(rows.dim);
  float initial[kChunks<D> * kLanes];
  Lanes sum[kChunks<D>];
  for (int64_t b = tile.begin; b < tile.end; ++b) {
    for (int64_t f = tile.first_feature; f < tile.last_feature; ++f) {
      const int64_t bag = plan.packed_feature[f] * batch.batch_size + b;
      const int64_t first = batch.begin(bag), last = batch.begin(bag + 1);
      float* const target = out + b * plan.stride + plan.column[f];
      for (int c = 0; c < num_chunks(shape); ++c) sum[c] = Lanes{};
      for (int64_t n = first; n < last; ++n) {
        const float* row = initial;
        if (slots[n] != kNoSlot) {
          row = rows.value(slots[n]);
        } else {
          fill_initial(shape, initializers[plan.table[f]], static_cast<uint64_t>(batch.keys[n]), initial);
        }
        for (int c = 0; c < num_chunks(shape); ++c) sum[c] += load(shape, row, c);
      }
      if (plan.is_mean[f] && last - first > 1) {
        const float scale = 1.0f / static_cast<float>(last - first);
        for (int c = 0; c < num_chunks(shape); ++c) sum[c] *= scale;
      }
      for (int c = 0; c < num_chunks(shape); ++c) {
        if (stream) {
          store_streaming(shape, target, c, sum[c]);
        } else {
          store(shape, target, c, sum[c]);
        }
      }
    }
  }
#if defined(__AVX512F__) || defined(__AVX2__)
  if (stream) _mm_sfence();
#endif
}

// Numbers the distinct slots in order of first appearance and lists each one's occurrences, in order.
// Returns how many there are; occurrences of number u are order[begin[u] .. begin[u + 1]).
inline uint32_t group_by_slot(const Occurrence* occurrences, int64_t count, const UpdateScratch& scratch) {
  constexpr uint64_t kFree = ~uint64_t{0};
  std::memset(scratch.hash_slots, 0xFF, scratch.hash_size * sizeof(uint64_t));
  const uint64_t mask = scratch.hash_size - 1;
  uint32_t unique = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t slot = occurrences[i].slot;
    uint64_t place = (slot * kGolden >> 32) & mask;
    uint64_t entry;
    while ((entry = scratch.hash_slots[place]) != kFree && entry >> 32 != slot) place = (place + 1) & mask;
    if (entry == kFree) {
      scratch.hash_slots[place] = slot << 32 | unique;
      scratch.begin[unique] = 1;
      scratch.unique_slot[unique] = static_cast<uint32_t>(slot);
      scratch.unique_of[i] = unique++;
    } else {
      const uint32_t u = static_cast<uint32_t>(entry);
      ++scratch.begin[u];
      scratch.unique_of[i] = u;
    }
  }
  // Counts become ends, and filling from the back turns the ends into beginnings.
  for (uint32_t u = 1; u < unique; ++u) scratch.begin[u] += scratch.begin[u - 1];
  scratch.begin[unique] = static_cast<uint32_t>(count);
  for (int64_t i = count - 1; i >= 0; --i) {
    scratch.order[--scratch.begin[scratch.unique_of[i]]] = static_cast<uint32_t>(i);
  }
  return unique;
}

template <int D, typename Optimizer>
int64_t update(const Rows& rows, const Occurrence* occurrences, int64_t count, const Hyper& hyper,
               const UpdateScratch& scratch) {
  constexpr int kGradAhead = 12;
  constexpr uint32_t kRowAhead = 16;
  const Shape<D> shape(rows.dim);
  const uint32_t unique = group_by_slot(occurrences, count, scratch);
  // Inlined by force: the compiler deems a function that only prefetches to be without effect, and drops calls of it.
  const auto prefetch_grad = [&](int64_t k) __attribute__((always_inline)) {
    prefetch_floats<0, 3>(occurrences[scratch.order[k]].grad, shape.dim());
  };
  const auto prefetch_target = [&](uint32_t u) __attribute__((always_inline)) {
    const uint32_t slot = scratch.unique_slot[u];
    prefetch_floats<1, 3>(rows.value(slot), shape.dim());
    prefetch_floats<1, 3>(rows.state(slot), rows.state_dim);
  };
  for (int64_t k = 0; k < count && k < kGradAhead; ++k) prefetch_grad(k);
  for (uint32_t u = 0; u < unique && u < kRowAhead; ++u) prefetch_target(u);
  Lanes grad[kChunks<D>];
  for (uint32_t u = 0; u < unique; ++u) {
    if (u + kRowAhead < unique) prefetch_target(u + kRowAhead);
    for (int c = 0; c < num_chunks(shape); ++c) grad[c] = Lanes{};
    const uint32_t last = scratch.begin[u + 1];
    for (uint32_t k = scratch.begin[u]; k < last; ++k) {
      if (k + kGradAhead < count) prefetch_grad(k + kGradAhead);
      const Occurrence& occurrence = occurrences[scratch.order[k]];
      for (int c = 0; c < num_chunks(shape); ++c) grad[c] += occurrence.scale * load(shape, occurrence.grad, c);
    }
    const uint32_t slot = scratch.unique_slot[u];
    Optimizer::step(shape, rows.value(slot), rows.state(slot), grad, hyper);
  }
  return unique;
}

void initialize(const Rows& rows, const Initializer& init, uint64_t key, float* value, float* state) {
  fill_initial(Shape<0>(rows.dim), init, key, value);
  for (uint32_t i = 0; i < rows.state_dim; ++i) state[i] = init.state;
}

template <int D>
RowKernels kernels_of(OptimizerKind optimizer) {
  switch (optimizer) {
    case OptimizerKind::kSgd:
      return {find, pool<D>, update<D, Sgd>, initialize};
    case OptimizerKind::kAdagrad:
      return {find, pool<D>, update<D, Adagrad>, initialize};
    case OptimizerKind::kRowWiseAdagrad:
      return {find, pool<D>, update<D, RowWiseAdagrad>, initialize};
    case OptimizerKind::kAdam:
      break;
  }
  return {find, pool<D>, update<D, Adam>, initialize};
}

}  // namespace

RowKernels row_kernels(uint32_t dim, OptimizerKind optimizer) {
  switch (dim) {
    case 8:
      return kernels_of<8>(optimizer);
    case 16:
      return kernels_of<16>(optimizer);
    case 32:
      return kernels_of<32>(optimizer);
    case 64:
      return kernels_of<64>(optimizer);
    case 128:
      return kernels_of<128>(optimizer);
    default:
      return kernels_of<0>(optimizer);
  }
}

}  // namespace PENSTOCK_ISA
}  // namespace penstock
