// Time by table; most calls have nothing to do.
#include "retention/clock.h"

#include <algorithm>
#include <limits>

namespace penstock {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// The first multiple of `period` after `now`.
int64_t next_multiple(int64_t now, uint64_t period) {
  const uint64_t number = static_cast<uint64_t>(now) / period + 1;
  return number > static_cast<uint64_t>(kNever) / period ? kNever : static_cast<int64_t>(number * period);
}

}  // namespace

int64_t Clock::now(uint32_t table) const {
  const int64_t own = tables_.numbers[table].now;
  if (!follows_[table]) return own;
  return std::max(own, std::min(tables_.policies[table].in_seconds ? told_seconds_ : told_step_, kMaxTime));
}

int64_t Clock::step(uint32_t table) const {
  const int64_t own = tables_.numbers[table].step;
  return follows_[table] ? std::max(own, told_step_) : own;
}

Clock::Events Clock::advance(uint64_t step_now, uint64_t seconds_now) {
  const int64_t step = static_cast<int64_t>(std::min<uint64_t>(step_now, kNever / 2));
  const int64_t seconds = static_cast<int64_t>(std::min<uint64_t>(seconds_now, kMaxTime));
  Events events;
  const bool is_event = step >= next_step_ || seconds >= next_second_;
  if (is_event) {
    full_tables_.clear();
    for (uint32_t table = 0; table < tables_.size(); ++table) judge(table, step, seconds, &events);
  } else if (step > told_step_) {
    for (const uint32_t table : std::exchange(full_tables_, {})) judge(table, step, seconds, &events);
  }
  told_step_ = std::max(told_step_, step);
  told_seconds_ = std::max(told_seconds_, seconds);
  draw_step_ = std::max(draw_step_, step_now);
  if (is_event) find_next_events();
  return events;
}

// Before the clock of the store has moved.
void Clock::judge(uint32_t table, int64_t step_now, int64_t seconds_now, Events* events) {
  const RetentionPolicy& policy = tables_.policies[table];
  RetentionNumbers& numbers = tables_.numbers[table];
  numbers.now = std::max(now(table), std::min(policy.in_seconds ? seconds_now : step_now, kMaxTime));
  numbers.step = step(table);
  follows_[table] = true;
  if (policy.ttl != 0) {
    const int64_t period = static_cast<int64_t>(policy.sweep_period());
    if (numbers.now / period != numbers.swept / period) {
      numbers.swept = numbers.now;
      events->expiring.push_back(table);
    }
  }
  if (step_now <= numbers.step) {
    if (numbers.candidates_are_full != 0) full_tables_.push_back(table);
    return;
  }
  if (policy.min_count != 0) {
    int64_t times = numbers.candidates_are_full;
    if (policy.count_half_life != 0) {
      const int64_t half_life = static_cast<int64_t>(policy.count_half_life);
      times = std::max(times, std::min<int64_t>(step_now / half_life - numbers.step / half_life, 16));
    }
    numbers.candidates_are_full = 0;
    if (times != 0) events->halvings.emplace_back(table, static_cast<uint32_t>(times));
  }
  numbers.step = step_now;
}

// When `advance` has to look at all tables again.
void Clock::find_next_events() {
  next_step_ = next_second_ = kNever;
  for (uint32_t table = 0; table < tables_.size(); ++table) {
    const RetentionPolicy& policy = tables_.policies[table];
    if (policy.ttl != 0) {
      int64_t& next = policy.in_seconds ? next_second_ : next_step_;
      next = std::min(next, next_multiple(now(table), policy.sweep_period()));
    }
    if (policy.count_half_life != 0) next_step_ = std::min(next_step_, next_multiple(step(table), policy.count_half_life));
  }
}

void Clock::note_full(uint32_t table) {
  if (tables_.numbers[table].candidates_are_full == 0) full_tables_.push_back(table);
  tables_.numbers[table].candidates_are_full = 1;
}

RetentionNumbers Clock::numbers(uint32_t table) const {
  RetentionNumbers numbers = tables_.numbers[table];
  numbers.now = now(table);
  numbers.step = step(table);
  return numbers;
}

void Clock::set_numbers(uint32_t table, const RetentionNumbers& numbers) {
  tables_.numbers[table] = numbers;
  follows_[table] = false;
  next_step_ = next_second_ = 0;
  draw_step_ = std::max(draw_step_, static_cast<uint64_t>(numbers.step));
}

}  // namespace penstock
