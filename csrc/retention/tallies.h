// What the newcomers of one call amount to, by table: counted by threads, summed up once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace penstock {

struct Tally {
  int64_t wanted = 0;
  int64_t uncounted = 0;
  int64_t admitted = 0;
  int64_t refused = 0;
  int64_t candidates = 0;  // change of their number
  bool is_touched = false;
};
using Totals = std::vector<std::pair<uint32_t, Tally>>;  // of the tables touched, in their order

// Those of one thread. Clearing them costs what was touched, not what there is.
class alignas(64) Tallies {
 public:
  explicit Tallies(size_t tables) : of_table_(tables) {}
  Tally& operator[](uint32_t table) {
    Tally& tally = of_table_[table];
    if (!tally.is_touched) {
      touched_.push_back(table);
      tally.is_touched = true;
    }
    return tally;
  }
  void clear() noexcept;

  // Sums up what all threads have counted, and clears it.
  static Totals take(std::vector<Tallies>& of_threads);

 private:
  std::vector<Tally> of_table_;
  std::vector<uint32_t> touched_;
};

}  // namespace penstock
