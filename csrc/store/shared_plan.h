// A PoolingPlan that owns its arrays; look-ups share it with whoever made it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "rows/row_kernels.h"

namespace penstock {

class SharedPlan {
 public:
  // [F] arrays, as PoolingPlan has them.
  SharedPlan(std::vector<int64_t> packed_feature, std::vector<uint32_t> table, std::vector<Pooling> pooling,
             std::vector<int64_t> max_keys, std::vector<int64_t> column, int64_t stride)
      : packed_feature_(std::move(packed_feature)),
        table_(std::move(table)),
        pooling_(std::move(pooling)),
        max_keys_(std::move(max_keys)),
        column_(std::move(column)),
        stride_(stride),
        by_table_(table_.size()) {
    std::iota(by_table_.begin(), by_table_.end(), 0);
    std::stable_sort(by_table_.begin(), by_table_.end(), [this](int64_t a, int64_t b) { return table_[a] < table_[b]; });
  }

  // Every key is a row of the output: keys [offsets[t], offsets[t + 1]) are table t's. The batch has one sample, and a bag for
  // each key. Null: the offsets do not rise from 0 to `keys`.
  static std::shared_ptr<const SharedPlan> by_key(const int64_t* given, size_t tables, int64_t keys, uint32_t dim) {
    // What is checked is the copy: nobody else can change it.
    const std::vector<int64_t> offsets(given, given + tables + 1);
    if (offsets.front() != 0 || offsets.back() != keys || !std::is_sorted(offsets.begin(), offsets.end())) return nullptr;
    std::vector<int64_t> first(offsets.begin(), offsets.end() - 1), column(tables), samples(tables);
    std::vector<uint32_t> table(tables);
    std::iota(table.begin(), table.end(), 0);
    for (size_t t = 0; t < tables; ++t) {
      column[t] = offsets[t] * int64_t{dim};
      samples[t] = offsets[t + 1] - offsets[t];
    }
    auto plan = std::make_shared<SharedPlan>(std::move(first), std::move(table), std::vector<Pooling>(tables, Pooling::kSum),
                                             std::vector<int64_t>(tables, 0), std::move(column), int64_t{dim});
    plan->samples_ = std::move(samples);
    return plan;
  }

  bool is_by_key() const { return !samples_.empty(); }

  PoolingPlan view() const {
    return {static_cast<int64_t>(table_.size()), packed_feature_.data(), table_.data(), pooling_.data(), max_keys_.data(),
            column_.data(), stride_, by_table_.data(), is_by_key() ? samples_.data() : nullptr};
  }

  // Whether all it names is there: packed features, tables, and as many columns as the rows of `dim` take.
  bool fits(int64_t packed_features, size_t tables, uint32_t dim) const {
    const size_t features = table_.size();
    if (packed_feature_.size() != features || pooling_.size() != features || max_keys_.size() != features ||
        column_.size() != features || stride_ < 0) {
      return false;
    }
    for (size_t f = 0; f < features; ++f) {
      const bool is_sequence = pooling_[f] == Pooling::kSequence;
      if (packed_feature_[f] < 0 || packed_feature_[f] >= packed_features || table_[f] >= tables) return false;
      if (pooling_[f] > Pooling::kSequence || (is_sequence ? max_keys_[f] < 1 : max_keys_[f] != 0)) return false;
      const int64_t vectors = is_sequence ? max_keys_[f] : 1;
      if (column_[f] < 0 || column_[f] > stride_ || vectors > (stride_ - column_[f]) / int64_t{dim}) return false;
    }
    return true;
  }

  // Whether it is of the same features, tables and poolings, wherever their columns are.
  bool reads_as(const SharedPlan& other) const {
    if (is_by_key() || other.is_by_key()) return is_by_key() && other.is_by_key() && table_ == other.table_;
    return packed_feature_ == other.packed_feature_ && table_ == other.table_ && pooling_ == other.pooling_;
  }

 private:
  std::vector<int64_t> packed_feature_;
  std::vector<uint32_t> table_;
  std::vector<Pooling> pooling_;
  std::vector<int64_t> max_keys_;
  std::vector<int64_t> column_;
  int64_t stride_;
  std::vector<int64_t> by_table_;
  std::vector<int64_t> samples_;  // by feature; empty: not by key
};

}  // namespace penstock
