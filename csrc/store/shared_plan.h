// A PoolingPlan that owns its arrays; look-ups share it with whoever made it.
#pragma once

#include <algorithm>
#include <cstdint>
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

  PoolingPlan view() const {
    return {static_cast<int64_t>(table_.size()), packed_feature_.data(), table_.data(), pooling_.data(), max_keys_.data(),
            column_.data(), stride_, by_table_.data()};
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
};

}  // namespace penstock
