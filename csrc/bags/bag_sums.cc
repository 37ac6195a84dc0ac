// Bags of rows by number: the kernels of a store, without its index.
#include "bags/bag_sums.h"

#include <algorithm>
#include <vector>

namespace penstock {
namespace {

constexpr int64_t kKeysPerTask = 1024;

}  // namespace

BagSums::BagSums(uint32_t dim, int num_threads) : dim_(dim), pool_(num_threads) {
  const char* isa;
  kernels_ = select_row_kernels(dim, ValueType::kFloat32, OptimizerKind::kSgd, "", &isa);
}

void BagSums::pool(const PoolingPlan& plan, const PackedKeys& batch, const uint32_t* numbers, const float* rows,
                   float* out) {
  // Kernels write values of rows elsewhere, never here.
  const Rows view{reinterpret_cast<char*>(const_cast<float*>(rows)), nullptr, dim_, 0, 0, ValueType::kFloat32,
                  static_cast<uint32_t>(dim_ * sizeof(float))};
  std::vector<Tile> tiles;
  for (int64_t f = 0; f < plan.num_features; ++f) {
    const int64_t per_bag = batch.count(plan, f) / std::max<int64_t>(1, batch.batch_size) + 1;
    const int64_t samples = std::max<int64_t>(1, kKeysPerTask / per_bag);
    for (int64_t b = 0; b < batch.batch_size; b += samples) {
      tiles.push_back({f, f + 1, b, std::min(b + samples, batch.batch_size)});
    }
  }
  pool_.run(static_cast<int64_t>(tiles.size()), [&](int64_t tile, int) {
    kernels_.pool(view, plan, batch, numbers, nullptr, tiles[tile], false, out);
  });
}

void BagSums::sum(const PoolingPlan& plan, const PackedKeys& batch, const uint32_t* numbers, const float* grad, int64_t count,
                  float* sums) {
  // A part of the rows each; every part goes over all keys.
  const int64_t parts = std::min<int64_t>(pool_.num_threads(), count);
  pool_.run(parts, [&](int64_t part, int) {
    const int64_t low = count * part / parts, high = count * (part + 1) / parts;
    std::fill(sums + low * dim_, sums + high * dim_, 0.0f);
    for (int64_t f = 0; f < plan.num_features; ++f) {
      const int64_t first_bag = batch.first_bag(plan, f);
      const bool is_sequence = plan.pooling[f] == Pooling::kSequence;
      for (int64_t b = 0; b < batch.batch_size; ++b) {
        const int64_t begin = batch.begin(first_bag + b), end = batch.begin(first_bag + b + 1);
        const float scale = batch.weights == nullptr
                                ? is_sequence ? 1.0f : bag_scale(plan.pooling[f], end - begin)
                                : weighted_bag_scale(plan.pooling[f], batch.weights + begin, end - begin);
        const float* source = grad + b * plan.stride + plan.column[f];
        for (int64_t n = begin; n < end; ++n, source += is_sequence ? dim_ : 0) {
          if (numbers[n] < low || numbers[n] >= high) continue;
          const float share = batch.weights == nullptr ? scale : scale * batch.weights[n];
          float* const sum = sums + size_t{numbers[n]} * dim_;
          for (uint32_t i = 0; i < dim_; ++i) sum[i] += share * source[i];
        }
      }
    }
  });
}

}  // namespace penstock
