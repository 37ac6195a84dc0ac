// Tallies of threads, summed up.
#include "retention/tallies.h"

#include <algorithm>

namespace penstock {

void Tallies::clear() noexcept {
  for (const uint32_t table : touched_) of_table_[table] = Tally{};
  touched_.clear();
}

Totals Tallies::take(std::vector<Tallies>& of_threads) {
  Tallies& sum = of_threads[0];
  for (size_t thread = 1; thread < of_threads.size(); ++thread) {
    Tallies& theirs = of_threads[thread];
    for (const uint32_t table : theirs.touched_) {
      const Tally& one = theirs[table];
      Tally& total = sum[table];
      total.wanted += one.wanted;
      total.uncounted += one.uncounted;
      total.admitted += one.admitted;
      total.refused += one.refused;
      total.candidates += one.candidates;
    }
    theirs.clear();
  }
  Totals totals;
  totals.reserve(sum.touched_.size());
  for (const uint32_t table : sum.touched_) totals.emplace_back(table, sum[table]);
  sum.clear();
  std::sort(totals.begin(), totals.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  return totals;
}

}  // namespace penstock
