// Places of rows in the index, by table.
#include "tables/export_order.h"

#include <algorithm>

namespace penstock {
namespace {

constexpr uint64_t kMostInOrder = 1 << 21;  // rows whose places are kept for an export; of a large index a 16th of its entries

}  // namespace

void ExportOrder::keys_changed() noexcept {
  ++version_;
  first_ = 0;
  std::vector<uint64_t>().swap(begin_);
  std::vector<uint64_t>().swap(places_);
}

bool ExportOrder::is_short(uint64_t rows, uint64_t places) { return rows <= std::max(kMostInOrder, places / 16); }

ExportOrder::Places ExportOrder::of(uint32_t table, const Tables& tables, const Entry* entries, uint64_t places) {
  const auto number_of = [&] { return (table + tables.size() - first_) % tables.size(); };
  if (number_of() + 1 >= begin_.size()) fill(table, tables, entries, places);
  const uint64_t number = number_of();
  return {places_.data() + begin_[number], places_.data() + begin_[number + 1]};
}

// Finds the places of this table's rows and, as long as they are not too many, of those after it, in one pass.
void ExportOrder::fill(uint32_t table, const Tables& all, const Entry* entries, uint64_t num_places) {
  const uint32_t tables = static_cast<uint32_t>(all.size());
  std::vector<uint64_t> begin{0};
  for (uint32_t number = 0; number < tables; ++number) {
    const uint64_t end = begin.back() + all.num_rows((table + number) % tables);
    if (!is_short(end, num_places)) break;
    begin.push_back(end);
  }
  std::vector<uint64_t> places(begin.back());
  std::vector<uint64_t> next(begin.begin(), begin.end() - 1);
  for (uint64_t place = 0; place < num_places; ++place) {
    const Entry& entry = entries[place];
    if (entry.slot() == kNoSlot) continue;
    const uint32_t number = entry.table() >= table ? entry.table() - table : entry.table() + tables - table;
    if (number < next.size()) places[next[number]++] = place;
  }
  first_ = table;
  begin_ = std::move(begin);
  places_ = std::move(places);
}

}  // namespace penstock
