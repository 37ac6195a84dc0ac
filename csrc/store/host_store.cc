// Insertion by shard, update by table.
#include "store/host_store.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

namespace penstock {
namespace {

constexpr int64_t kMinUnitKeys = 2048;     // fewer keys are not worth another pass over a table's slots
constexpr int64_t kMaxUnitKeys = 16384;    // the grouping of more keys leaves the L2 cache
constexpr int64_t kMostParts = 32;         // of a table: more passes over its slots take longer than a grouping in the L3 cache
constexpr size_t kMostSummed = 2 * kMaxUnitKeys;  // a key that is most of a batch makes a larger unit, and few sums
constexpr size_t kMaxIdleLookupBytes = size_t{256} << 20;

std::atomic<uint64_t> stores_made{0};

template <typename T>
void ensure_size(std::vector<T>& v, size_t size) {
  if (v.size() < size) v.resize(std::max(size, v.size() + v.size() / 2));
}

}  // namespace

HostStore::HostStore(uint32_t dim, ValueType type, uint32_t state_dim, uint32_t usage_dim, OptimizerKind optimizer,
                     const std::vector<TableRules>& tables, int num_threads, uint64_t max_bytes,
                     std::string_view most_isa, uint64_t scan_from)
    : dim_(dim),
      type_(type),
      value_bytes_(dim * bytes_of(type)),
      state_dim_(state_dim),
      usage_dim_(usage_dim),
      max_bytes_(max_bytes != 0 ? max_bytes : 2 * uint64_t{physical_memory_bytes()}),
      scan_from_(scan_from),
      kernels_(select_row_kernels(dim, type, optimizer, most_isa, &isa_)),
      retention_(tables.size()),
      default_slots_(tables.size(), kNoSlot),
      rows_of_table_(tables.size()),
      candidates_of_table_(tables.size()),
      listed_(tables.size()),
      row_thresholds_(tables.size()),
      candidate_thresholds_(tables.size()),
      number_of_table_(tables.size(), kNoNumber),
      follows_(tables.size(), true),
      number_(stores_made.fetch_add(1) + 1),
      pool_(num_threads),
      shards_(kNumShards),
      scratch_(num_threads),
      lookup_memory_(std::make_shared<BufferPool>(kMaxIdleLookupBytes)) {
  uint64_t most_entries = 0;
  for (const TableRules& table : tables) {
    initializers_.push_back(table.initializer);
    policies_.push_back(table.retention);
    retains_ |= table.retention.retains;
    if (table.retention.refuses) default_slots_[initializers_.size() - 1] = static_cast<uint32_t>(num_defaults_++);
    const bool is_bounded = table.retention.max_rows != kUnlimited && most_entries != kUnlimited;
    most_entries = is_bounded ? most_entries + table.retention.max_rows + table.retention.max_candidates : kUnlimited;
  }
  // Marks of use take memory, so that less of it is left for the index.
  growth_ = {usage_dim_ != 0 ? 20u : 30u, most_entries};
  if (retains_) {
    for (ThreadScratch& scratch : scratch_) scratch.tallies = Tallies(tables.size());
  }
}

bool HostStore::open() {
  const uint64_t state_bytes = (state_dim_ + usage_dim_) * sizeof(float), most_rows = max_bytes_ / (value_bytes_ + state_bytes);
  const bool is_open = index_.open() && values_.reserve(most_rows * value_bytes_) &&
                       states_.reserve(most_rows * state_bytes) && commit_slots(num_defaults_);
  if (!is_open) return false;
  slots_handed_out_ = num_defaults_;
  for (uint32_t table = 0; table < default_slots_.size(); ++table) {
    if (default_slots_[table] == kNoSlot) continue;
    const std::vector<float> value(dim_, policies_[table].default_value);
    store_values(type_, value.data(), dim_, rows().value(default_slots_[table]));
    std::fill_n(rows().state(default_slots_[table]), state_dim_, initializers_[table].state);
  }
  return true;
}

// After a call that was given up somewhere. An entry of the index, its slot and its place in a list are made and given up
// together, but not all that is counted of them, and what belongs to the call may be left. Slots that were not given back yet
// stay in the lists of freed ones, for the next call that does so.
void HostStore::recount() noexcept {
  ++erase_version_;
  content_changed();
  for (std::atomic<uint64_t>& rows : rows_of_table_) rows.store(0, std::memory_order_relaxed);
  std::fill(candidates_of_table_.begin(), candidates_of_table_.end(), 0);
  const Entry* const entries = index_.view().entries;
  for (uint64_t i = 0; i < index_.capacity() * kNumShards; ++i) {
    if (entries[i].is_empty()) continue;
    const uint32_t table = entries[i].table();
    if (entries[i].is_candidate()) {
      ++candidates_of_table_[table];
    } else {
      ++rows_of_table_[table];
    }
  }
  for (ThreadScratch& scratch : scratch_) scratch.tallies.clear();
  std::fill(row_thresholds_.begin(), row_thresholds_.end(), Threshold{});
  std::fill(candidate_thresholds_.begin(), candidate_thresholds_.end(), Threshold{});
  std::fill(number_of_table_.begin(), number_of_table_.end(), kNoNumber);
  std::fill(in_use_bits_.begin(), in_use_bits_.end(), 0);
}

bool HostStore::commit_slots(uint64_t slots) {
  return values_.commit(slots * value_bytes_) && states_.commit(slots * (state_dim_ + usage_dim_) * sizeof(float));
}

uint64_t HostStore::extent_rows() const {
  // A 64th of a shard's share at a time: little is handed out and unused, and the lock is seldom taken.
  return std::clamp<uint64_t>(slots_handed_out_ / kNumShards / 64 / kLeastExtent, 1, 256) * kLeastExtent;
}

Status HostStore::take_slot(uint32_t shard_number, uint32_t* slot) {
  ShardSlots& shard = shards_[shard_number];
  if (!shard.free.empty()) {
    *slot = shard.free.back();
    shard.free.pop_back();
    return Status::kOk;
  }
  if (shard.next == shard.end) {
    const std::lock_guard<std::mutex> guard(arena_growth_);
    const uint64_t rows = extent_rows();
    if (!free_slots_.empty()) {
      const auto first = free_slots_.end() - static_cast<int64_t>(std::min<uint64_t>(rows, free_slots_.size()));
      shard.free.assign(first, free_slots_.end());
      free_slots_.erase(first, free_slots_.end());
      *slot = shard.free.back();
      shard.free.pop_back();
      return Status::kOk;
    }
    if (slots_handed_out_ + rows >= kNoSlot) return Status::kTooManyRows;
    if (!commit_slots(slots_handed_out_ + rows)) return Status::kOutOfMemory;
    first_owners_.insert(first_owners_.end(), rows / kLeastExtent, static_cast<uint8_t>(shard_number));
    shard.next = static_cast<uint32_t>(slots_handed_out_);
    shard.end = static_cast<uint32_t>(slots_handed_out_ + rows);
    slots_handed_out_ += rows;
  }
  *slot = shard.next++;
  return Status::kOk;
}

Status HostStore::insert_shard(uint32_t shard_number, const Miss* misses, int64_t count, int64_t* done) {
  constexpr int64_t kAhead = 8;
  const IndexView index = index_.view();
  // Misses of one feature come one after the other: their table's rows are counted together.
  uint32_t table = 0;
  uint64_t rows_of_table = 0;
  const auto count_rows = [&] {
    if (rows_of_table != 0) rows_of_table_[table].fetch_add(rows_of_table, std::memory_order_relaxed);
    rows_of_table = 0;
  };
  for (int64_t& i = *done; i < count; ++i) {
    if (i + kAhead < count) {
      const uint64_t hash = index_.hash(misses[i + kAhead].key, misses[i + kAhead].table);
      __builtin_prefetch(index.shard(hash) + index.home(hash), 1);
    }
    const Miss& miss = misses[i];
    const uint64_t hash = index_.hash(miss.key, miss.table);
    if (const Entry* const entry = index_.find(miss.key, miss.table, hash)) {
      *miss.slot = entry->slot();
      continue;
    }
    const Status status = index_.is_full(shard_number) ? Status::kIndexFull : take_slot(shard_number, miss.slot);
    if (status != Status::kOk) {
      count_rows();
      return status;
    }
    kernels_.initialize(rows(), initializers_[miss.table], miss.key, rows().value(*miss.slot), rows().state(*miss.slot));
    index_.insert(miss.key, Entry::pack(miss.table, *miss.slot), hash);
    if (miss.table != table) count_rows();
    table = miss.table;
    ++rows_of_table;
  }
  count_rows();
  return Status::kOk;
}

std::vector<int64_t> HostStore::sort_misses() {
  const auto shard_of = [this](const Miss& miss) { return Index::shard_of(index_.hash(miss.key, miss.table)); };
  // Counting sort by shard; each thread's misses stay in their order.
  const int64_t threads = num_threads();
  std::vector<int64_t> begin(kNumShards * threads + 1);
  pool_.run(threads, [&](int64_t t, int) {
    for (const Miss& miss : scratch_[t].misses) ++begin[shard_of(miss) * threads + t + 1];
  });
  for (size_t i = 1; i < begin.size(); ++i) begin[i] += begin[i - 1];
  ensure_size(sorted_misses_, static_cast<size_t>(begin.back()));
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  pool_.run(threads, [&](int64_t t, int) {
    for (const Miss& miss : scratch_[t].misses) sorted_misses_[next[shard_of(miss) * threads + t]++] = miss;
  });
  std::vector<int64_t> of_shard(kNumShards + 1);
  for (uint32_t shard = 0; shard <= kNumShards; ++shard) of_shard[shard] = begin[shard * threads];
  return of_shard;
}

Status HostStore::insert_misses(Insert insert, const std::vector<SlotSpan>& in_use) {
  content_changed();
  const std::vector<int64_t> begin = sort_misses();
  if (retains_) return admit_misses(begin, insert == Insert::kAll, in_use);
  std::vector<int64_t> done(kNumShards);
  return insert_by_shard([&](uint32_t shard, int) {
    return insert_shard(shard, sorted_misses_.data() + begin[shard], begin[shard + 1] - begin[shard], &done[shard]);
  });
}

Status HostStore::insert_by_shard(const std::function<Status(uint32_t, int)>& insert) {
  // No exception leaves this: what has been inserted is for the caller to note.
  try {
    std::vector<Status> status(kNumShards);
    for (;;) {
      pool_.run(kNumShards, [&](int64_t shard, int thread) { status[shard] = insert(static_cast<uint32_t>(shard), thread); });
      bool is_full = false;
      for (const Status s : status) {
        if (s != Status::kOk && s != Status::kIndexFull) return s;
        is_full |= s == Status::kIndexFull;
      }
      if (!is_full) return Status::kOk;
      if (!index_.grow(pool_, growth_)) return Status::kOutOfMemory;
    }
  } catch (const std::bad_alloc&) {
    return Status::kNoWorkingMemory;
  }
}

Status HostStore::refresh(LookupGradient& gradient) {
  // Rows that were erased since the look-up begin anew; those of tables with rules may have been evicted, and stay away.
  Lookup& lookup = *gradient.lookup;
  if (lookup.erase_version == erase_version_ && lookup.num_missing == 0) return Status::kOk;
  const PoolingPlan plan = lookup.plan->view();
  for (ThreadScratch& scratch : scratch_) scratch.misses.clear();
  // Beside those of before, so that nothing has changed if there is no memory.
  std::vector<uint32_t> slots(static_cast<size_t>(lookup.num_keys));
  std::vector<int64_t> dropped(policies_.size());
  const Tile everything{0, plan.num_features, 0, gradient.batch.batch_size};
  find_tile(plan, gradient.batch, everything, slots.data(), scratch_[0]);
  std::vector<Miss>& misses = scratch_[0].misses;
  if (retains_) {
    for (int64_t f = 0; f < plan.num_features; ++f) {
      const uint32_t default_slot = default_slots_[plan.table[f]];
      if (default_slot == kNoSlot) continue;
      const int64_t bag = plan.packed_feature[f] * gradient.batch.batch_size;
      for (int64_t i = gradient.batch.begin(bag), end = gradient.batch.begin(bag + gradient.batch.batch_size); i < end; ++i) {
        if (lookup.slots[i] == default_slot) slots[i] = default_slot;
      }
    }
    const auto stays_away = [&](const Miss& miss) {
      if (!policies_[miss.table].retains) return false;
      dropped[miss.table] += *miss.slot == kNoSlot;
      return true;
    };
    misses.erase(std::remove_if(misses.begin(), misses.end(), stays_away), misses.end());
  }
  if (!misses.empty()) {
    const Status status = insert_misses(Insert::kAdmitted, {});
    if (status != Status::kOk) return status;
  }
  for (size_t table = 0; table < dropped.size(); ++table) retention_[table].dropped += dropped[table];
  std::copy(slots.begin(), slots.end(), lookup.slots);
  lookup.erase_version = erase_version_;
  lookup.num_missing = 0;
  return Status::kOk;
}

std::vector<HostStore::Unit> HostStore::update_units(const PoolingPlan& plan,
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
        const int64_t bag = plan.packed_feature[plan.by_table[last]] * gradient.batch.batch_size;
        count += gradient.batch.begin(bag + gradient.batch.batch_size) - gradient.batch.begin(bag);
      }
    }
    total += count;
    if (count == 0) continue;
    units.push_back({table, 0, 1, first, last});
    keys.push_back(count);
  }
  const int64_t unit_keys = std::clamp<int64_t>(total / (int64_t{4} * num_threads()), kMinUnitKeys, kMaxUnitKeys);
  // Each part goes over all keys of its table.
  const int64_t most_parts = std::max<int64_t>(kMostParts, int64_t{4} * num_threads());
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

int64_t HostStore::collect_occurrences(const std::vector<LookupGradient>& gradients, const Unit& unit,
                                       std::vector<Occurrence>* occurrences) const {
  Occurrence* next = occurrences->data();
  const auto make_room = [occurrences, &next](int64_t count) {
    const size_t used = static_cast<size_t>(next - occurrences->data());
    ensure_size(*occurrences, used + static_cast<size_t>(count) + 1);  // one is written behind the last
    next = occurrences->data() + used;
  };
  const auto add = [&unit, &next](const float* source, uint32_t slot, float scale) __attribute__((always_inline)) {
    *next = {source, slot, scale};
    // Multiply-shift of a scrambled slot: even parts, whatever the pattern of the slots. No slot: evicted since the look-up.
    next += (slot != kNoSlot) & ((uint64_t{slot * 0x9E3779B1u} * unit.parts) >> 32 == unit.part);
  };
  for (const auto& [lookup, batch, grad] : gradients) {
    // Of the same features, but its gradient's columns are its own.
    const PoolingPlan plan = lookup->plan->view();
    const uint32_t* const slots = lookup->slots;
    for (int64_t i = unit.first; i < unit.last; ++i) {
      const int64_t f = plan.by_table[i];
      const int64_t first_bag = plan.packed_feature[f] * batch.batch_size;
      const float* const column = grad + plan.column[f];
      const bool is_plain = batch.weights == nullptr && plan.pooling[f] != Pooling::kSequence;
      if (is_plain && batch.is_one_hot) {
        for (int64_t first = 0; first < batch.batch_size; first += kMinUnitKeys) {
          const int64_t last = std::min(first + kMinUnitKeys, batch.batch_size);
          make_room(last - first);
          for (int64_t b = first; b < last; ++b) add(column + b * plan.stride, slots[first_bag + b], 1.0f);
        }
        continue;
      }
      for (int64_t b = 0; b < batch.batch_size; ++b) {
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
        for (int64_t n = begin; n < end; ++n, source += plan.pooling[f] == Pooling::kSequence ? dim_ : 0) {
          add(source, slots[n], batch.weights == nullptr ? scale : scale * batch.weights[n]);
        }
      }
    }
  }
  return next - occurrences->data();
}

UpdateScratch HostStore::update_scratch(size_t count, ThreadScratch& scratch) const {
  uint64_t hash_size = 64;
  while (hash_size < 2 * count) hash_size *= 2;
  ensure_size(scratch.hash_slots, hash_size);
  ensure_size(scratch.unique_of, count);
  ensure_size(scratch.unique_slot, count);
  ensure_size(scratch.begin, count + 1);
  ensure_size(scratch.order, count);
  float* sums = nullptr;
  if (dim_ <= kMostSummedDim && count <= kMostSummed) {
    constexpr size_t kAlign = 64 / sizeof(float);
    ensure_size(scratch.sums, (count + 1) * ((dim_ + kAlign - 1) / kAlign * kAlign) + kAlign);
    sums = scratch.sums.data() + (kAlign - reinterpret_cast<uintptr_t>(scratch.sums.data()) / sizeof(float) % kAlign) % kAlign;
  }
  return {scratch.hash_slots.data(), scratch.unique_of.data(), scratch.unique_slot.data(), scratch.begin.data(),
          scratch.order.data(),      hash_size,                sums};
}

Status HostStore::apply_gradients(std::vector<LookupGradient>& gradients, const Hyper* hypers, uint64_t step,
                                  bool is_order_free, int64_t* rows_updated) {
  *rows_updated = 0;
  if (gradients.empty()) return Status::kOk;
  return call([&] { return update(gradients, hypers, step, is_order_free, rows_updated); });
}

Status HostStore::update(std::vector<LookupGradient>& gradients, const Hyper* hypers, uint64_t step, bool is_order_free,
                         int64_t* rows_updated) {
  const PoolingPlan plan = gradients.front().lookup->plan->view();
  for (LookupGradient& gradient : gradients) {
    const Status status = refresh(gradient);
    if (status != Status::kOk) return status;
  }
  const std::vector<Unit> units = update_units(plan, gradients);
  for (ThreadScratch& scratch : scratch_) scratch.rows = 0;
  uint64_t keys = 0;
  for (const LookupGradient& gradient : gradients) keys += static_cast<uint64_t>(gradient.batch.num_keys);
  const int sum_bits = is_order_free ? sum_bits_of(keys) : 0;
  ++content_version_;
  std::atomic<bool> has_begun{false};
  try {
    pool_.run(static_cast<int64_t>(units.size()), [&](int64_t unit, int thread) {
      ThreadScratch& scratch = scratch_[thread];
      const int64_t count = collect_occurrences(gradients, units[unit], &scratch.occurrences);
      if (count == 0) return;
      const UpdateScratch working = update_scratch(static_cast<size_t>(count), scratch);
      has_begun.store(true, std::memory_order_relaxed);
      const int64_t updated = kernels_.update(rows(), scratch.occurrences.data(), count, hypers[units[unit].table],
                                              step_seed(step), sum_bits, working);
      if (usage_dim_ != 0) mark_used(scratch.unique_slot.data(), updated, units[unit].table);
      scratch.rows += updated;
    });
  } catch (const std::bad_alloc&) {
    if (!has_begun) throw;
    for (const LookupGradient& gradient : gradients) gradient.lookup->is_applied = true;
    return Status::kHalfUpdated;
  }
  for (const LookupGradient& gradient : gradients) gradient.lookup->is_applied = true;
  for (const ThreadScratch& scratch : scratch_) *rows_updated += scratch.rows;
  return Status::kOk;
}

}  // namespace penstock
