// The time of tables, and what is due by it: sweeps for rows beyond their ttl, halvings of counts.
#include <algorithm>
#include <limits>
#include <utility>

#include "store/host_store.h"

namespace penstock {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// The first multiple of `period` after `now`.
int64_t next_multiple(int64_t now, uint64_t period) {
  const uint64_t number = static_cast<uint64_t>(now) / period + 1;
  return number > static_cast<uint64_t>(kNever) / period ? kNever : static_cast<int64_t>(number * period);
}

}  // namespace

int64_t HostStore::now_of(uint32_t table) const {
  const int64_t own = retention_[table].now;
  if (!follows_[table]) return own;
  return std::max(own, std::min(policies_[table].in_seconds ? clock_seconds_ : clock_step_, kMaxTime));
}

int64_t HostStore::step_of(uint32_t table) const {
  const int64_t own = retention_[table].step;
  return follows_[table] ? std::max(own, clock_step_) : own;
}

Status HostStore::advance(uint64_t step, uint64_t seconds) {
  if (!retains_) return Status::kOk;
  return call([&] {
    move_time(step, seconds);
    return Status::kOk;
  });
}

void HostStore::move_time(uint64_t step_now, uint64_t seconds_now) {
  const int64_t step = static_cast<int64_t>(std::min<uint64_t>(step_now, kNever / 2));
  const int64_t seconds = static_cast<int64_t>(std::min<uint64_t>(seconds_now, kMaxTime));
  std::vector<uint32_t> expiring;
  std::vector<std::pair<uint32_t, uint32_t>> halvings;
  const bool is_event = step >= next_step_ || seconds >= next_second_;
  if (is_event) {
    full_tables_.clear();
    for (uint32_t table = 0; table < policies_.size(); ++table) judge_time(table, step, seconds, &expiring, &halvings);
  } else if (step > clock_step_) {
    for (const uint32_t table : std::exchange(full_tables_, {})) judge_time(table, step, seconds, &expiring, &halvings);
  }
  clock_step_ = std::max(clock_step_, step);
  clock_seconds_ = std::max(clock_seconds_, seconds);
  step_ = std::max(step_, step_now);
  if (is_event) find_next_events();
  if (!expiring.empty()) evict_expired(expiring);
  if (!halvings.empty()) halve_counts(halvings);
}

// Before the clock of the store has moved.
void HostStore::judge_time(uint32_t table, int64_t step, int64_t seconds, std::vector<uint32_t>* expiring,
                           std::vector<std::pair<uint32_t, uint32_t>>* halvings) {
  const RetentionPolicy& policy = policies_[table];
  RetentionNumbers& numbers = retention_[table];
  numbers.now = std::max(now_of(table), std::min(policy.in_seconds ? seconds : step, kMaxTime));
  numbers.step = step_of(table);
  follows_[table] = true;
  if (policy.ttl != 0) {
    const int64_t period = static_cast<int64_t>(policy.sweep_period());
    if (numbers.now / period != numbers.swept / period) {
      numbers.swept = numbers.now;
      expiring->push_back(table);
    }
  }
  if (step <= numbers.step) {
    if (numbers.candidates_are_full != 0) full_tables_.push_back(table);
    return;
  }
  if (policy.min_count != 0) {
    int64_t times = numbers.candidates_are_full;
    if (policy.count_half_life != 0) {
      const int64_t half_life = static_cast<int64_t>(policy.count_half_life);
      times = std::max(times, std::min<int64_t>(step / half_life - numbers.step / half_life, 16));
    }
    numbers.candidates_are_full = 0;
    if (times != 0) halvings->emplace_back(table, static_cast<uint32_t>(times));
  }
  numbers.step = step;
}

// When `advance` has to look at all tables again.
void HostStore::find_next_events() {
  next_step_ = next_second_ = kNever;
  for (uint32_t table = 0; table < policies_.size(); ++table) {
    const RetentionPolicy& policy = policies_[table];
    if (policy.ttl != 0) {
      int64_t& next = policy.in_seconds ? next_second_ : next_step_;
      next = std::min(next, next_multiple(now_of(table), policy.sweep_period()));
    }
    if (policy.count_half_life != 0) next_step_ = std::min(next_step_, next_multiple(step_of(table), policy.count_half_life));
  }
}

}  // namespace penstock
