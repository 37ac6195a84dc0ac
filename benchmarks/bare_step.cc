// The training step of contestants.py by a program that is told everything a store must find out: the place of each key's row,
// and which keys of a table are equal. Rows are looked up with prefetches into an output that is written around the caches;
// gradients are summed and row-wise Adagrad is applied, a table at a time on each thread of the store's own pool. What is left is
// the machine's time.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "system/thread_pool.h"

namespace {

constexpr int64_t kAhead = 16;
constexpr int64_t kTile = 2048;  // samples of one table that a thread looks up at a time
constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef float LooseLanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));  // anywhere in memory

// One batch of T tables x B samples; all arrays outlive it.
struct Batch {
  int64_t tables;
  int64_t size;
  const uint32_t* places;  // [T, B] row of each key
  const uint32_t* number;  // [T, B] which of its table's distinct rows that is, by first appearance
  const uint32_t* unique;  // [T, B] row of each number
  const uint32_t* begin;   // [T, B + 1] occurrences of number u are order[begin[u] .. begin[u + 1])
  const uint32_t* order;   // [T, B]
  const uint32_t* count;   // [T] distinct rows
};

template <int D>
void prefetch(const float* row) {
  for (int column = 0; column < D; column += kLanes) __builtin_prefetch(row + column);
}

template <int D>
void prefetch_to_write(const float* row) {
  for (int column = 0; column < D; column += kLanes) __builtin_prefetch(row + column, 1);
}

template <int D>
void look_up(const float* rows, const Batch& batch, int64_t table, int64_t first, int64_t last, float* out) {
  const uint32_t* const places = batch.places + table * batch.size;
  for (int64_t b = first; b < last && b < first + kAhead; ++b) prefetch<D>(rows + int64_t{places[b]} * D);
  for (int64_t b = first; b < last; ++b) {
    if (b + kAhead < last) prefetch<D>(rows + int64_t{places[b + kAhead]} * D);
    const float* const row = rows + int64_t{places[b]} * D;
    float* const target = out + (b * batch.tables + table) * D;
    for (int column = 0; column < D; column += 4) _mm_stream_ps(target + column, _mm_loadu_ps(row + column));
  }
  _mm_sfence();
}

template <int D>
void step_row(float* row, float* state, const Lanes* sum, float learning_rate, float eps) {
  constexpr int kChunks = D / kLanes;
  Lanes squares = {};
  for (int c = 0; c < kChunks; ++c) squares += sum[c] * sum[c];
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += squares[i];
  *state += total / D;
  const float factor = learning_rate / (std::sqrt(*state) + eps);
  LooseLanes* const value = reinterpret_cast<LooseLanes*>(row);
  for (int c = 0; c < kChunks; ++c) value[c] -= factor * sum[c];
}

template <int D>
void update(float* rows, float* states, const Batch& batch, int64_t table, const float* grad, float learning_rate,
            float eps, std::vector<Lanes>& sums) {
  constexpr int kChunks = D / kLanes;
  const int64_t size = batch.size, stride = batch.tables * D;
  const float* const column = grad + table * D;
  const uint32_t* const number = batch.number + table * size;
  const uint32_t* const unique = batch.unique + table * size;
  const uint32_t* const begin = batch.begin + table * (size + 1);
  const uint32_t* const order = batch.order + table * size;
  const uint32_t count = batch.count[table];
  const auto gradient = [=](int64_t b) { return reinterpret_cast<const LooseLanes*>(column + b * stride); };
  const auto prefetch_target = [=](uint32_t u) __attribute__((always_inline)) {
    prefetch_to_write<D>(rows + int64_t{unique[u]} * D);
    __builtin_prefetch(states + unique[u], 1);
  };
  if constexpr (D <= 32) {
    // Short ones as they come: their sums stay in the cache.
    sums.assign(int64_t{count} * kChunks, Lanes{});
    for (int64_t b = 0; b < size; ++b) {
      if (b + kAhead < size) prefetch<D>(column + (b + kAhead) * stride);
      for (int c = 0; c < kChunks; ++c) sums[int64_t{number[b]} * kChunks + c] += gradient(b)[c];
    }
  }
  for (uint32_t u = 0; u < count && u < kAhead; ++u) prefetch_target(u);
  for (uint32_t u = 0; u < count; ++u) {
    if (u + kAhead < count) prefetch_target(u + kAhead);
    Lanes sum[kChunks] = {};
    if constexpr (D <= 32) {
      std::memcpy(sum, &sums[int64_t{u} * kChunks], sizeof(sum));
    } else {
      for (uint32_t k = begin[u]; k < begin[u + 1]; ++k) {
        if (k + kAhead < size) prefetch<D>(column + order[k + kAhead] * stride);
        for (int c = 0; c < kChunks; ++c) sum[c] += gradient(order[k])[c];
      }
    }
    step_row<D>(rows + int64_t{unique[u]} * D, states + unique[u], sum, learning_rate, eps);
  }
}

template <int D>
void step(penstock::ThreadPool& pool, float* rows, float* states, const Batch& batch, float* out, const float* grad,
          float learning_rate, float eps) {
  const int64_t tiles = (batch.size + kTile - 1) / kTile;
  pool.run(batch.tables * tiles, [&](int64_t i, int) {
    const int64_t first = i % tiles * kTile;
    look_up<D>(rows, batch, i / tiles, first, first + kTile < batch.size ? first + kTile : batch.size, out);
  });
  pool.run(batch.tables, [&](int64_t table, int) {
    thread_local std::vector<Lanes> sums;
    update<D>(rows, states, batch, table, grad, learning_rate, eps, sums);
  });
}

}  // namespace

extern "C" {

void* start_pool(int threads) { return new penstock::ThreadPool(threads); }

void stop_pool(void* pool) { delete static_cast<penstock::ThreadPool*>(pool); }

// rows [*, dim], states [*]; out and grad [B, T * dim]; dim is 16 or 128.
void bare_step(void* pool, float* rows, float* states, int64_t dim, int64_t tables, int64_t size, const uint32_t* places,
               const uint32_t* number, const uint32_t* unique, const uint32_t* begin, const uint32_t* order,
               const uint32_t* count, float* out, const float* grad, float learning_rate, float eps) {
  const Batch batch{tables, size, places, number, unique, begin, order, count};
  penstock::ThreadPool& threads = *static_cast<penstock::ThreadPool*>(pool);
  if (dim == 16) step<16>(threads, rows, states, batch, out, grad, learning_rate, eps);
  if (dim == 128) step<128>(threads, rows, states, batch, out, grad, learning_rate, eps);
}

}  // extern "C"
