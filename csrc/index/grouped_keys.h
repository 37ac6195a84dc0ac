// Keys laid out by group, each once if that is wanted: what travels to whom.
#pragma once

#include <cstdint>
#include <vector>

namespace penstock {

struct GroupedKeys {
  std::vector<int64_t> keys;     // those of one group side by side, in the order in which they came first
  std::vector<int64_t> counts;   // [num_groups]
  std::vector<int64_t> numbers;  // [count] by place: which of `keys`
};

// Groups of keys [count], each below num_groups. With `once` a key of a group that comes several times is there once.
GroupedKeys grouped_keys(const int64_t* keys, const int64_t* groups, int64_t count, int64_t num_groups, bool once);

}  // namespace penstock
