// One optimizer step for every row that look-ups touched, on the sum of its gradients; and the norm of those sums.
#pragma once

#include <vector>

#include "store/insertion.h"
#include "store/lookup.h"
#include "tables/key_finder.h"

namespace penstock {

class Updates {
 public:
  Updates(KeyedRows& rows, KeyFinder& finder, Insertion& insertion, const Eviction& eviction)
      : rows_(rows), finder_(finder), insertion_(insertion), eviction_(eviction), threads_(rows.pool.num_threads()) {}

  // See HostStore; there is a gradient.
  Status apply(std::vector<LookupGradient>& gradients, const Hyper* hypers, uint64_t step, bool is_order_free,
               const DefaultGradients* defaults, int64_t* rows_updated);
  Status measure(std::vector<LookupGradient>& gradients, double order, bool is_order_free, double* total);

 private:
  struct alignas(64) Thread {
    std::vector<Occurrence> occurrences;
    std::vector<uint64_t> hash_slots;
    std::vector<uint32_t> unique_of, unique_slot, begin, order;
    std::vector<float> sums;
    int64_t rows = 0;
  };
  // Keys of one table of the plan that one thread updates: those of `part` among `parts`, by slot.
  struct Unit {
    uint32_t table;
    uint32_t part;
    uint32_t parts;
    int64_t first;  // features of the table: plan.by_table[first .. last)
    int64_t last;
  };

  // Finds rows again where some were erased since the look-up.
  Status refresh(LookupGradient& gradient);
  std::vector<Unit> units_of(const PoolingPlan& plan, const std::vector<LookupGradient>& gradients) const;
  // Those of a slot are left out, if it is not kNoSlot. Returns how many there are; the vector may be longer.
  int64_t collect(const std::vector<LookupGradient>& gradients, const Unit& unit, uint32_t left_out,
                  std::vector<Occurrence>* occurrences) const;
  void step_defaults(const DefaultGradients& defaults, const Hyper* hypers, uint64_t step);
  UpdateScratch scratch_for(size_t count, Thread& thread) const;

  KeyedRows& rows_;
  KeyFinder& finder_;
  Insertion& insertion_;
  const Eviction& eviction_;
  std::vector<Thread> threads_;
};

}  // namespace penstock
