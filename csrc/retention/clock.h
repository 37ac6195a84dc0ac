// The time of tables, and what is due by it: sweeps for rows beyond their ttl, halvings of counts.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "tables/tables.h"

namespace penstock {

using Halvings = std::vector<std::pair<uint32_t, uint32_t>>;  // table, times

class Clock {
 public:
  explicit Clock(Tables& tables) : tables_(tables), follows_(tables.size(), true) {}

  // The time that a table's rows age by, and its step.
  int64_t now(uint32_t table) const;
  int64_t step(uint32_t table) const;
  // By which chance admits keys, in all tables.
  uint64_t draw_step() const { return draw_step_; }

  // What is due at a time.
  struct Events {
    std::vector<uint32_t> expiring;
    Halvings halvings;
  };
  // Moves the time on. Costs what is due, not what there is.
  Events advance(uint64_t step, uint64_t seconds);
  // A table has more keys to count than places: its counts are halved at the next step.
  void note_full(uint32_t table);

  // What a table remembers, with its time as it is now.
  RetentionNumbers numbers(uint32_t table) const;
  void set_numbers(uint32_t table, const RetentionNumbers& numbers);

 private:
  void judge(uint32_t table, int64_t step, int64_t seconds, Events* events);
  void find_next_events();

  Tables& tables_;
  uint64_t draw_step_ = 0;
  // The time that `advance` was told; a table goes by it or, where that is later, by its own.
  int64_t told_step_ = 0;
  int64_t told_seconds_ = 0;
  std::vector<uint8_t> follows_;  // by table; false: its numbers were set since the last `advance`
  int64_t next_step_ = 0;  // before both of these, `advance` has nothing to do in any table
  int64_t next_second_ = 0;
  std::vector<uint32_t> full_tables_;
};

}  // namespace penstock
