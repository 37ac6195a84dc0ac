// Groups by counting; a hash table finds what comes again.
#include "index/grouped_keys.h"

#include <bit>
#include <limits>

#include "index/hashing.h"

namespace penstock {
namespace {

constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();
constexpr int64_t kAhead = 16;

// Of each place the number of its (key, group) among those that differ, in the order in which they come; `first`: where each
// of them came first.
void number_distinct(const int64_t* keys, const int64_t* groups, int64_t count, int64_t* numbers, std::vector<int64_t>* first) {
  const uint64_t size = std::bit_ceil(static_cast<uint64_t>(2 * count + 1));
  std::vector<uint32_t> table(size, kNone);
  const auto home = [&](int64_t i) {
    return mix64(static_cast<uint64_t>(keys[i]) ^ mix64(static_cast<uint64_t>(groups[i]))) & (size - 1);
  };
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) __builtin_prefetch(&table[home(i + kAhead)], 1);
    uint64_t place = home(i);
    while (table[place] != kNone) {
      const int64_t other = (*first)[table[place]];
      if (keys[other] == keys[i] && groups[other] == groups[i]) break;
      place = (place + 1) & (size - 1);
    }
    if (table[place] == kNone) {
      table[place] = static_cast<uint32_t>(first->size());
      first->push_back(i);
    }
    numbers[i] = table[place];
  }
}

}  // namespace

GroupedKeys grouped_keys(const int64_t* keys, const int64_t* groups, int64_t count, int64_t num_groups, bool once) {
  GroupedKeys out{{}, std::vector<int64_t>(num_groups), std::vector<int64_t>(count)};
  std::vector<int64_t> first;  // empty: every place is one of its own
  if (once) number_distinct(keys, groups, count, out.numbers.data(), &first);
  const int64_t number = once ? static_cast<int64_t>(first.size()) : count;
  const auto place_of = [&](int64_t n) { return once ? first[n] : n; };
  for (int64_t n = 0; n < number; ++n) ++out.counts[groups[place_of(n)]];
  std::vector<int64_t> next(num_groups), moved(once ? number : 0);
  for (int64_t group = 1; group < num_groups; ++group) next[group] = next[group - 1] + out.counts[group - 1];
  out.keys.resize(number);
  int64_t* const to = once ? moved.data() : out.numbers.data();
  for (int64_t n = 0; n < number; ++n) {
    to[n] = next[groups[place_of(n)]]++;
    out.keys[to[n]] = keys[place_of(n)];
  }
  for (int64_t i = 0; once && i < count; ++i) out.numbers[i] = moved[out.numbers[i]];
  return out;
}

}  // namespace penstock
