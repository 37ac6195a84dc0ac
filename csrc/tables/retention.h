// Which keys have rows: rules of admission, eviction and budget, and what a table counts. penstock/embedding/retention.py
// is the same in Python and says what the names mean.
#pragma once

#include <cstdint>

#include "index/hashing.h"

namespace penstock {

constexpr uint64_t kUnlimited = ~uint64_t{0};
constexpr uint32_t kMaxCount = (1u << 16) - 1;  // of the occurrences of a key without a row
constexpr uint64_t kSweepsPerTtl = 16;
constexpr uint64_t kEvictedBeyondNeed = 32;
constexpr int64_t kMaxTime = (int64_t{1} << 32) - 1;  // what a mark of use can say; later times read as it

struct RetentionPolicy {
  bool retains;  // has any rule; else every key gets a row, which stays
  bool refuses;  // keys without a row read the default row
  float default_value;

  uint64_t admission_seed;
  uint64_t admit_below;  // kUnlimited: all
  uint32_t min_count;    // 0: keys are not counted
  uint64_t count_half_life;

  uint64_t max_rows;
  uint64_t max_candidates;

  bool evicts;
  bool by_uses;      // rows leave by a number beside the time of their last use
  bool counts_uses;  // which an update counts up; else it is a score, and stays as it is
  bool in_seconds;
  uint64_t ttl;        // 0: none
  uint64_t half_life;  // 0: none

  // A key's draw at a step. FORMAT: never change.
  bool draws(uint64_t key, uint64_t step) const {
    return admit_below == kUnlimited || mix64(key ^ mix64(step ^ admission_seed)) < admit_below;
  }
  uint64_t sweep_period() const { return ttl < kSweepsPerTtl ? 1 : ttl / kSweepsPerTtl; }
  uint32_t aged_uses(uint32_t uses, uint64_t last_use, uint64_t now) const {
    if (half_life == 0) return uses;
    const uint64_t halvings = last_use < now ? now / half_life - last_use / half_life : 0;
    return halvings > 31 ? 0 : uses >> halvings;
  }
};

// What a table remembers besides rows and candidates; part of a checkpoint, in this order.
struct RetentionNumbers {
  int64_t now = 0;
  int64_t step = 0;
  int64_t swept = 0;
  int64_t candidates_are_full = 0;
  int64_t admitted = 0;
  int64_t refused = 0;
  int64_t evicted = 0;
  int64_t evicted_age = 0;
  int64_t dropped = 0;
  int64_t ahead = 0;
};

// Orders keys where nothing else does; a bijection.
inline uint64_t precedence(uint64_t key) { return mix64(key); }

}  // namespace penstock
