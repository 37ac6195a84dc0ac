// Updates by table: a row's gradients are summed and its step is taken while they are in the cache.
#include "store/updates.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "system/memory.h"

namespace penstock {
namespace {

constexpr int64_t kMinUnitKeys = 2048;     // fewer keys are not worth another pass over a table's slots
constexpr int64_t kMaxUnitKeys = 16384;    // the grouping of more keys leaves the L2 cache
constexpr int64_t kMostParts = 32;         // of a table: more passes over its slots take longer than a grouping in the L3 cache
constexpr size_t kMostSummed = 2 * kMaxUnitKeys;  // a key that is most of a batch makes a larger unit, and few sums

}  // namespace

Status Updates::refresh(LookupGradient& gradient) {
  // Rows that were erased since the look-up begin anew; those of tables with rules may have been evicted, and stay away.
  Lookup& lookup = *gradient.lookup;
  if (lookup.erase_version == rows_.slots.erase_version() && lookup.num_missing == 0) return Status::kOk;
  const PoolingPlan plan = lookup.plan->view();
  finder_.begin();
  // Beside those of before, so that nothing has changed if there is no memory.
  std::vector<uint32_t> slots(static_cast<size_t>(lookup.num_keys));
  std::vector<int64_t> dropped(rows_.tables.size());
  for (int64_t f = 0; f < plan.num_features; ++f) {
    const Tile all{f, f + 1, 0, gradient.batch.samples(plan, f)};
    finder_.find_tile(plan, gradient.batch, all, slots.data(), 0);
  }
  std::vector<Miss>& misses = finder_.misses(0);
  if (rows_.tables.retains) {
    for (int64_t f = 0; f < plan.num_features; ++f) {
      const uint32_t default_slot = rows_.tables.default_slots[plan.table[f]];
      if (default_slot == kNoSlot) continue;
      const int64_t first = gradient.batch.begin(gradient.batch.first_bag(plan, f));
      for (int64_t i = first, end = first + gradient.batch.count(plan, f); i < end; ++i) {
        if (lookup.slots[i] == default_slot) slots[i] = default_slot;
      }
    }
    const auto stays_away = [&](const Miss& miss) {
      if (!rows_.tables.policies[miss.table].retains) return false;
      dropped[miss.table] += *miss.slot == kNoSlot;
      return true;
    };
    misses.erase(std::remove_if(misses.begin(), misses.end(), stays_away), misses.end());
  }
  if (!misses.empty()) {
    const Status status = insertion_.insert(false, {});
    if (status != Status::kOk) return status;
  }
  for (size_t table = 0; table < dropped.size(); ++table) rows_.tables.numbers[table].dropped += dropped[table];
  std::copy(slots.begin(), slots.end(), lookup.slots);
  lookup.erase_version = rows_.slots.erase_version();
  lookup.num_missing = 0;
  return Status::kOk;
}

std::vector<Updates::Unit> Updates::units_of(const PoolingPlan& plan,
                                             const std::vector<LookupGradient>& gradients) const {
  // A table's keys are one unit, so that its rows are summed and updated while they are in the cache; a table with many
  // keys is split by slot. A row belongs to one unit, and its occurrences are visited in the order of (look-up, feature,
  // sample, key), so sums do not depend on the number of threads.
  std::vector<Unit> units;
  std::vector<int64_t> keys;
  int64_t total = 0;
  for (int64_t first = 0, last; first < plan.num_features; first = last) {
    const uint32_t table = plan.table[plan.by_table[first]];
    int64_t count = 0;
    for (last = first; last < plan.num_features && plan.table[plan.by_table[last]] == table; ++last) {
      for (const LookupGradient& gradient : gradients) {
        count += gradient.batch.count(gradient.lookup->plan->view(), plan.by_table[last]);
      }
    }
    total += count;
    if (count == 0) continue;
    units.push_back({table, 0, 1, first, last});
    keys.push_back(count);
  }
  const int64_t unit_keys = std::clamp<int64_t>(total / (int64_t{4} * rows_.pool.num_threads()), kMinUnitKeys, kMaxUnitKeys);
  // Each part goes over all keys of its table.
  const int64_t most_parts = std::max<int64_t>(kMostParts, int64_t{4} * rows_.pool.num_threads());
  const size_t tables = units.size();
  for (size_t i = 0; i < tables; ++i) {
    units[i].parts = static_cast<uint32_t>(std::min((keys[i] + unit_keys - 1) / unit_keys, most_parts));
    for (uint32_t part = 1; part < units[i].parts; ++part) {
      units.push_back(units[i]);
      units.back().part = part;
    }
  }
  return units;
}

int64_t Updates::collect(const std::vector<LookupGradient>& gradients, const Unit& unit, uint32_t left_out,
                         std::vector<Occurrence>* occurrences) const {
  Occurrence* next = occurrences->data();
  const auto make_room = [occurrences, &next](int64_t count) {
    const size_t used = static_cast<size_t>(next - occurrences->data());
    ensure_size(*occurrences, used + static_cast<size_t>(count) + 1);  // one is written behind the last
    next = occurrences->data() + used;
  };
  const auto add = [&unit, &next, left_out](const float* source, uint32_t slot, float scale) __attribute__((always_inline)) {
    *next = {source, slot, scale};
    // Multiply-shift of a scrambled slot: even parts, whatever the pattern of the slots. No slot: evicted since the look-up.
    next += (slot != kNoSlot) & (slot != left_out) & ((uint64_t{slot * 0x9E3779B1u} * unit.parts) >> 32 == unit.part);
  };
  for (const auto& [lookup, batch, grad] : gradients) {
    // Of the same features, but its gradient's columns are its own.
    const PoolingPlan plan = lookup->plan->view();
    const uint32_t* const slots = lookup->slots;
    for (int64_t i = unit.first; i < unit.last; ++i) {
      const int64_t f = plan.by_table[i];
      const int64_t first_bag = batch.first_bag(plan, f), samples = batch.samples(plan, f);
      const float* const column = grad + plan.column[f];
      const bool is_plain = batch.weights == nullptr && plan.pooling[f] != Pooling::kSequence;
      if (is_plain && batch.is_one_hot) {
        for (int64_t first = 0; first < samples; first += kMinUnitKeys) {
          const int64_t last = std::min(first + kMinUnitKeys, samples);
          make_room(last - first);
          for (int64_t b = first; b < last; ++b) add(column + b * plan.stride, slots[first_bag + b], 1.0f);
        }
        continue;
      }
      for (int64_t b = 0; b < samples; ++b) {
        const int64_t begin = batch.begin(first_bag + b), end = batch.begin(first_bag + b + 1);
        const float* source = column + b * plan.stride;
        make_room(end - begin);
        if (is_plain) {
          const float scale = bag_scale(plan.pooling[f], end - begin);
          for (int64_t n = begin; n < end; ++n) add(source, slots[n], scale);
          continue;
        }
        const float scale =
            batch.weights == nullptr ? 1.0f : weighted_bag_scale(plan.pooling[f], batch.weights + begin, end - begin);
        for (int64_t n = begin; n < end; ++n, source += plan.pooling[f] == Pooling::kSequence ? rows_.layout.dim : 0) {
          add(source, slots[n], batch.weights == nullptr ? scale : scale * batch.weights[n]);
        }
      }
    }
  }
  return next - occurrences->data();
}

UpdateScratch Updates::scratch_for(size_t count, Thread& scratch) const {
  uint64_t hash_size = 64;
  while (hash_size < 2 * count) hash_size *= 2;
  ensure_size(scratch.hash_slots, hash_size);
  ensure_size(scratch.unique_of, count);
  ensure_size(scratch.unique_slot, count);
  ensure_size(scratch.begin, count + 1);
  ensure_size(scratch.order, count);
  float* sums = nullptr;
  if (rows_.layout.dim <= kMostSummedDim && count <= kMostSummed) {
    constexpr size_t kAlign = 64 / sizeof(float);
    ensure_size(scratch.sums, (count + 1) * ((rows_.layout.dim + kAlign - 1) / kAlign * kAlign) + kAlign);
    sums = scratch.sums.data() + (kAlign - reinterpret_cast<uintptr_t>(scratch.sums.data()) / sizeof(float) % kAlign) % kAlign;
  }
  return {scratch.hash_slots.data(), scratch.unique_of.data(), scratch.unique_slot.data(), scratch.begin.data(),
          scratch.order.data(),      hash_size,                sums};
}

Status Updates::apply(std::vector<LookupGradient>& gradients, const Hyper* hypers, uint64_t step, bool is_order_free,
                         const DefaultGradients* defaults, int64_t* rows_updated) {
  const PoolingPlan plan = gradients.front().lookup->plan->view();
  for (LookupGradient& gradient : gradients) {
    const Status status = refresh(gradient);
    if (status != Status::kOk) return status;
  }
  const std::vector<Unit> units = units_of(plan, gradients);
  for (Thread& scratch : threads_) scratch.rows = 0;
  uint64_t keys = 0;
  for (const LookupGradient& gradient : gradients) keys += static_cast<uint64_t>(gradient.batch.num_keys);
  const int sum_bits = is_order_free ? sum_bits_of(keys) : 0;
  rows_.order.values_changed();
  std::atomic<bool> has_begun{false};
  try {
    rows_.pool.run(static_cast<int64_t>(units.size()), [&](int64_t unit, int thread) {
      Thread& scratch = threads_[thread];
      const uint32_t left_out = defaults == nullptr ? kNoSlot : rows_.tables.default_slots[units[unit].table];
      const int64_t count = collect(gradients, units[unit], left_out, &scratch.occurrences);
      if (count == 0) return;
      const UpdateScratch working = scratch_for(static_cast<size_t>(count), scratch);
      has_begun.store(true, std::memory_order_relaxed);
      const int64_t updated = rows_.kernels.update(rows_.rows(), scratch.occurrences.data(), count, hypers[units[unit].table],
                                              step_seed(step), sum_bits, working);
      if (rows_.layout.usage_dim != 0) eviction_.mark_used(scratch.unique_slot.data(), updated, units[unit].table);
      scratch.rows += updated;
    });
    if (defaults != nullptr) {
      has_begun = true;
      step_defaults(*defaults, hypers, step);
    }
  } catch (const std::bad_alloc&) {
    if (!has_begun) throw;
    for (const LookupGradient& gradient : gradients) gradient.lookup->is_applied = true;
    return Status::kHalfUpdated;
  }
  for (const LookupGradient& gradient : gradients) gradient.lookup->is_applied = true;
  for (const Thread& scratch : threads_) *rows_updated += scratch.rows;
  return Status::kOk;
}

void Updates::step_defaults(const DefaultGradients& defaults, const Hyper* hypers, uint64_t step) {
  const UpdateScratch working = scratch_for(1, threads_[0]);
  for (uint32_t table = 0; table < rows_.tables.size(); ++table) {
    const uint32_t slot = rows_.tables.default_slots[table];
    if (slot == kNoSlot || !defaults.touched[table]) continue;
    // In fp32: a sum of one share is that share.
    const Occurrence all{defaults.sums + size_t{table} * rows_.layout.dim, slot, 1.0f};
    rows_.kernels.update(rows_.rows(), &all, 1, hypers[table], step_seed(step), 0, working);
  }
}

Status Updates::measure(std::vector<LookupGradient>& gradients, double order, bool is_order_free, double* total) {
  const PoolingPlan plan = gradients.front().lookup->plan->view();
  uint64_t keys = 0;
  for (LookupGradient& gradient : gradients) {
    const Status status = refresh(gradient);
    if (status != Status::kOk) return status;
    keys += static_cast<uint64_t>(gradient.batch.num_keys);
  }
  const std::vector<Unit> units = units_of(plan, gradients);
  const int sum_bits = is_order_free ? sum_bits_of(keys) : 0;
  std::vector<GradientNorm> norms(threads_.size());
  for (GradientNorm& norm : norms) norm.order = order;
  rows_.pool.run(static_cast<int64_t>(units.size()), [&](int64_t unit, int thread) {
    Thread& scratch = threads_[thread];
    const int64_t count = collect(gradients, units[unit], kNoSlot, &scratch.occurrences);
    if (count == 0) return;
    const UpdateScratch working = scratch_for(static_cast<size_t>(count), scratch);
    rows_.kernels.measure(rows_.layout.dim, scratch.occurrences.data(), count, sum_bits, working, &norms[thread]);
  });
  for (size_t thread = 1; thread < norms.size(); ++thread) norms[0].add(norms[thread]);
  *total = norms[0].total();
  return Status::kOk;
}

}  // namespace penstock
