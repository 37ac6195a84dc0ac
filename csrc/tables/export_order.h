// Where the rows of tables are in the index, table by table, for exports; and whether a cursor still holds.
#pragma once

#include <cstdint>
#include <vector>

#include "index/index.h"
#include "tables/tables.h"

namespace penstock {

// An export of many small tables passes over the index a few times in all. Places hold as long as no row comes or goes.
class ExportOrder {
 public:
  // Rises with every call that adds, removes or changes rows or counts: exports across it are torn.
  uint64_t version() const { return version_; }
  void values_changed() noexcept { ++version_; }
  // Whenever rows or counts come or go.
  void keys_changed() noexcept;

  // Whether a table's places are worth keeping: they are not too many, beside the places of the index.
  static bool is_short(uint64_t rows, uint64_t places);

  struct Places {
    const uint64_t* first;
    const uint64_t* last;
  };
  // The places of a short table's rows, in their order.
  Places of(uint32_t table, const Tables& tables, const Entry* entries, uint64_t places);

 private:
  void fill(uint32_t table, const Tables& tables, const Entry* entries, uint64_t places);

  uint64_t version_ = 1;
  uint32_t first_ = 0;  // the tables are first, first + 1, ..., after the last one 0
  std::vector<uint64_t> begin_;  // [tables + 1]
  std::vector<uint64_t> places_;
};

}  // namespace penstock
