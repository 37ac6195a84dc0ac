// Gives rows to the keys that a call has not found: to all of them, or in tables with rules to those admitted.
#pragma once

#include <vector>

#include "retention/admission.h"
#include "tables/key_finder.h"

namespace penstock {

class Insertion {
 public:
  Insertion(KeyedRows& rows, KeyFinder& finder, Admission& admission) : rows_(rows), finder_(finder), admission_(admission) {}

  // Of the finder's misses. With `admits_all` every key is admitted for which there is room. in_use: slots that must not be
  // evicted for them.
  Status insert(bool admits_all, const std::vector<SlotSpan>& in_use);

 private:
  SortedMisses sort_misses();
  Status insert_shard(uint32_t shard, const Miss* misses, int64_t count, int64_t* done);

  KeyedRows& rows_;
  KeyFinder& finder_;
  Admission& admission_;
  std::vector<Miss> sorted_;
};

}  // namespace penstock
