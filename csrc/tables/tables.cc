// Tables of a store: settings and counters.
#include "tables/tables.h"

#include <algorithm>

namespace penstock {

Tables::Tables(const std::vector<TableRules>& rules)
    : numbers(rules.size()), default_slots(rules.size(), kNoSlot), rows(rules.size()), candidates(rules.size()) {
  for (size_t table = 0; table < rules.size(); ++table) {
    initializers.push_back(rules[table].initializer);
    policies.push_back(rules[table].retention);
    retains |= rules[table].retention.retains;
    if (rules[table].retention.refuses) default_slots[table] = num_defaults++;
  }
}

uint64_t Tables::most_entries() const {
  uint64_t most = 0;
  for (const RetentionPolicy& policy : policies) {
    if (policy.max_rows == kUnlimited) return kUnlimited;
    most += policy.max_rows + policy.max_candidates;
  }
  return most;
}

void Tables::recount(const Entry* entries, uint64_t places) noexcept {
  for (std::atomic<uint64_t>& of_table : rows) of_table.store(0, std::memory_order_relaxed);
  std::fill(candidates.begin(), candidates.end(), 0);
  for (uint64_t place = 0; place < places; ++place) {
    if (entries[place].is_empty()) continue;
    const uint32_t table = entries[place].table();
    if (entries[place].is_candidate()) {
      ++candidates[table];
    } else {
      ++rows[table];
    }
  }
}

}  // namespace penstock
