// Which keys get rows, and which rows leave: admission, budgets, eviction, ageing.
//
// All of it is decided for a whole call at once, by functions of keys, counts and times alone, so that neither the order
// of the keys nor the number of threads matters.
#include <algorithm>

#include "host_store.h"

namespace penstock {
namespace {

constexpr uint64_t kEveryone = ~uint64_t{0};
constexpr uint64_t kSampleSize = 1 << 14;

}  // namespace

// --- admission ---------------------------------------------------------------------------------------------------------

Status HostStore::admit_misses(const std::vector<int64_t>& begin, bool admits_all, const std::vector<SlotSpan>& in_use) {
  clear_tallies();
  pool_.run(kNumShards, [&](int64_t shard, int thread) {
    judge_shard(static_cast<uint32_t>(shard), begin[shard], begin[shard + 1], admits_all, scratch_[thread].tally);
  });
  const Thresholds thresholds = make_room(total_tally(), in_use);
  clear_tallies();
  std::vector<int64_t> done(kNumShards);
  const Status status = insert_by_shard([&](uint32_t shard, int thread) {
    return admit_shard(shard, thresholds, admits_all, scratch_[thread].tally, &done[shard]);
  });
  const std::vector<Tally> totals = total_tally();
  bool is_over_budget = false;
  for (size_t table = 0; table < totals.size(); ++table) {
    candidates_of_table_[table] += static_cast<uint64_t>(totals[table].candidates);
    if (admits_all) {
      is_over_budget |= totals[table].refused != 0;
    } else {
      retention_[table].admitted += totals[table].admitted;
      retention_[table].refused += totals[table].refused;
    }
  }
  return status == Status::kOk && is_over_budget ? Status::kOverBudget : status;
}

// Finds the shard's distinct new keys, and which of them their table's rule admits.
void HostStore::judge_shard(uint32_t shard, int64_t first, int64_t last, bool admits_all, std::vector<Tally>& tally) {
  std::vector<Newcomer>& newcomers = newcomers_[shard];
  newcomers.clear();
  Miss* const misses = sorted_misses_.data();
  std::sort(misses + first, misses + last, [](const Miss& a, const Miss& b) {
    return a.key != b.key ? a.key < b.key : a.table < b.table;
  });
  for (int64_t end; first < last; first = end) {
    const auto [key, table, slot] = misses[first];
    for (end = first + 1; end < last && misses[end].key == key && misses[end].table == table;) ++end;
    const RetentionPolicy& policy = policies_[table];
    uint64_t count = static_cast<uint64_t>(end - first);
    bool is_candidate = false;
    if (policy.min_count != 0) {
      const Entry* const entry = index_.find(key, table, index_.hash(key, table));
      is_candidate = entry != nullptr;
      if (is_candidate) count += entry->count();
    }
    const bool is_wanted = admits_all || (count >= policy.min_count && policy.draws(key, step_));
    tally[table].wanted += is_wanted;
    tally[table].uncounted += !is_wanted && !is_candidate && policy.min_count != 0;
    newcomers.push_back({key, table, static_cast<uint32_t>(std::min<uint64_t>(count, kMaxCount)), first, end, is_wanted,
                         is_candidate});
  }
}

// Evicts where rows are wanted beyond the budget; says who comes in where that is not enough.
HostStore::Thresholds HostStore::make_room(const std::vector<Tally>& totals, const std::vector<SlotSpan>& in_use) {
  Thresholds thresholds{std::vector<uint64_t>(totals.size(), kEveryone), std::vector<uint64_t>(totals.size(), kEveryone)};
  for (uint32_t table = 0; table < totals.size(); ++table) {
    const RetentionPolicy& policy = policies_[table];
    const uint64_t wanted = static_cast<uint64_t>(totals[table].wanted);
    if (policy.max_rows == kUnlimited) continue;
    uint64_t room = policy.max_rows - num_rows(table);
    if (wanted > room) {
      if (policy.evicts) evict_lowest(table, wanted - room + policy.max_rows / kEvictedBeyondNeed, in_use);
      room = policy.max_rows - num_rows(table);
      if (wanted > room) thresholds.row[table] = threshold(table, true, room);
    }
    const uint64_t uncounted = static_cast<uint64_t>(totals[table].uncounted);
    uint64_t places = policy.max_candidates - candidates_of_table_[table];
    if (uncounted <= places) continue;
    for (const std::vector<Newcomer>& newcomers : newcomers_) {
      for (const Newcomer& one : newcomers) {
        // Those that get rows now give up their places.
        places += one.table == table && one.is_candidate && one.is_wanted && precedence(one.key) < thresholds.row[table];
      }
    }
    if (uncounted <= places) continue;
    retention_[table].candidates_are_full = 1;
    thresholds.candidate[table] = threshold(table, false, places);
  }
  return thresholds;
}

// The precedence below which there are `room` of the table's newcomers that want a row, or to be counted.
uint64_t HostStore::threshold(uint32_t table, bool of_rows, uint64_t room) const {
  std::vector<uint64_t> waiting;
  for (const std::vector<Newcomer>& newcomers : newcomers_) {
    for (const Newcomer& one : newcomers) {
      if (one.table == table && (of_rows ? one.is_wanted : !one.is_wanted && !one.is_candidate)) {
        waiting.push_back(precedence(one.key));
      }
    }
  }
  std::nth_element(waiting.begin(), waiting.begin() + static_cast<int64_t>(room), waiting.end());
  return waiting[room];
}

Status HostStore::admit_shard(uint32_t shard, const Thresholds& thresholds, bool admits_all, std::vector<Tally>& tally,
                              int64_t* done) {
  const std::vector<Newcomer>& newcomers = newcomers_[shard];
  for (int64_t& i = *done; i < static_cast<int64_t>(newcomers.size()); ++i) {
    const Newcomer& one = newcomers[i];
    const uint64_t rank = precedence(one.key);
    const uint64_t hash = index_.hash(one.key, one.table);
    // Evictions may have moved it since it was judged.
    Entry* const entry = policies_[one.table].min_count != 0 ? index_.find(one.key, one.table, hash) : nullptr;
    uint32_t slot = admits_all ? kNoSlot : default_slots_[one.table];
    if (one.is_wanted && rank < thresholds.row[one.table]) {
      const Status status = give_row(shard, one, entry, hash, &slot);
      if (status != Status::kOk) return status;
      tally[one.table].candidates -= entry != nullptr;
      ++tally[one.table].admitted;
    } else {
      if (entry != nullptr && !admits_all) {
        entry->meta = Entry::pack_candidate(one.table, one.count);
      } else if (policies_[one.table].min_count != 0 && !one.is_wanted && rank < thresholds.candidate[one.table]) {
        if (index_.is_full(shard)) return Status::kIndexFull;
        index_.insert(one.key, Entry::pack_candidate(one.table, one.count), hash);
        ++tally[one.table].candidates;
      }
      tally[one.table].refused += one.last - one.first;
    }
    for (int64_t miss = one.first; miss < one.last; ++miss) *sorted_misses_[miss].slot = slot;
  }
  return Status::kOk;
}

Status HostStore::give_row(uint32_t shard, const Newcomer& newcomer, Entry* entry, uint64_t hash, uint32_t* slot) {
  if (entry == nullptr && index_.is_full(shard)) return Status::kIndexFull;
  uint32_t row;
  const Status status = take_slot(shard, &row);
  if (status != Status::kOk) return status;
  *slot = row;
  kernels_.initialize(rows(), initializers_[newcomer.table], newcomer.key, rows().value(row), rows().state(row));
  if (usage_dim_ != 0) {
    rows().usage(row)[0] = static_cast<uint32_t>(retention_[newcomer.table].now);
    if (usage_dim_ == 2) rows().usage(row)[1] = 0;
  }
  const uint64_t meta = Entry::pack(newcomer.table, row);
  if (entry != nullptr) {
    entry->meta = meta;
  } else {
    index_.insert(newcomer.key, meta, hash);
  }
  ++shards_[shard].rows_of_table[newcomer.table];
  return Status::kOk;
}

void HostStore::clear_tallies() {
  for (ThreadScratch& scratch : scratch_) scratch.tally.assign(policies_.size(), Tally{});
}

std::vector<HostStore::Tally> HostStore::total_tally() const {
  std::vector<Tally> totals(policies_.size());
  for (const ThreadScratch& scratch : scratch_) {
    for (size_t table = 0; table < totals.size(); ++table) {
      totals[table].wanted += scratch.tally[table].wanted;
      totals[table].uncounted += scratch.tally[table].uncounted;
      totals[table].admitted += scratch.tally[table].admitted;
      totals[table].refused += scratch.tally[table].refused;
      totals[table].candidates += scratch.tally[table].candidates;
      totals[table].evicted += scratch.tally[table].evicted;
      totals[table].evicted_age += scratch.tally[table].evicted_age;
    }
  }
  return totals;
}

// --- eviction ----------------------------------------------------------------------------------------------------------

void HostStore::mark_used(const uint32_t* slots, int64_t count, uint32_t table) {
  const uint64_t now = static_cast<uint64_t>(retention_[table].now);
  for (int64_t i = 0; i < count; ++i) {
    uint32_t* const marks = rows().usage(slots[i]);
    if (usage_dim_ == 2) {
      const uint32_t uses = policies_[table].aged_uses(marks[1], marks[0], now);
      marks[1] = uses + (uses != ~0u);
    }
    marks[0] = static_cast<uint32_t>(now);
  }
}

// Rows leave in ascending order of (rank, precedence of the key).
uint64_t HostStore::rank_of(uint32_t table, uint32_t slot) const {
  const uint32_t* const marks = rows().usage(slot);
  if (!policies_[table].by_uses) return marks[0];
  const uint64_t now = static_cast<uint64_t>(retention_[table].now);
  return uint64_t{policies_[table].aged_uses(marks[1], marks[0], now)} << 32 | marks[0];
}

// All rows of a shard, of the tables marked, that `leaves` holds for.
template <typename Leaves>
void HostStore::collect_leavers(uint32_t shard, const std::vector<uint8_t>& tables, const Leaves& leaves,
                                std::vector<Leaver>* leavers) {
  constexpr uint64_t kAhead = 32;
  const uint64_t capacity = index_.capacity();
  const Entry* const entries = index_.view().entries + shard * capacity;
  const auto has_row = [&](const Entry& entry) {
    return !entry.is_empty() && entry.slot() != kNoSlot && tables[entry.table()] != 0;
  };
  for (uint64_t i = 0; i < capacity; ++i) {
    if (i + kAhead < capacity && has_row(entries[i + kAhead])) __builtin_prefetch(rows().usage(entries[i + kAhead].slot()));
    if (!has_row(entries[i])) continue;
    const uint32_t table = entries[i].table(), slot = entries[i].slot();
    const Leaver row{rank_of(table, slot), entries[i].key, table, static_cast<uint32_t>(retention_[table].now) - rows().usage(slot)[0]};
    if (leaves(row, slot)) leavers->push_back(row);
  }
}

// The caller owns the shard, whose rows these are.
void HostStore::erase_rows(uint32_t shard, const std::vector<Leaver>& leavers, std::vector<uint32_t>* freed) {
  constexpr size_t kAhead = 8;
  const IndexView index = index_.view();
  for (size_t i = 0; i < leavers.size(); ++i) {
    if (i + kAhead < leavers.size()) {
      const uint64_t hash = index_.hash(leavers[i + kAhead].key, leavers[i + kAhead].table);
      __builtin_prefetch(index.shard(hash) + index.home(hash), 1);
    }
    Entry* const entry = index_.find(leavers[i].key, leavers[i].table, index_.hash(leavers[i].key, leavers[i].table));
    freed->push_back(entry->slot());
    index_.erase(entry);
    --shards_[shard].rows_of_table[leavers[i].table];
  }
}

void HostStore::count_evicted(const std::vector<Leaver>& leavers, std::vector<Tally>& tally) const {
  for (const Leaver& leaver : leavers) {
    ++tally[leaver.table].evicted;
    tally[leaver.table].evicted_age += leaver.age;
  }
}

void HostStore::end_eviction() {
  const std::vector<Tally> totals = total_tally();
  for (size_t table = 0; table < totals.size(); ++table) {
    retention_[table].evicted += totals[table].evicted;
    retention_[table].evicted_age += totals[table].evicted_age;
  }
  return_freed_slots();
}

void HostStore::evict_lowest(uint32_t table, uint64_t count, const std::vector<SlotSpan>& in_use) {
  std::vector<bool> stays(slots_handed_out_);
  for (const SlotSpan& span : in_use) {
    for (int64_t i = 0; i < span.count; ++i) {
      if (span.slots[i] != kNoSlot) stays[span.slots[i]] = true;
    }
  }
  const auto is_before = [](const Leaver& a, const Leaver& b) {
    return a.rank != b.rank ? a.rank < b.rank : precedence(a.key) < precedence(b.key);
  };
  // A sample says about which row is the last to leave; so few rows need keeping to compare them.
  std::vector<Leaver> sample;
  const Entry* const entries = index_.view().entries;
  const uint64_t places = index_.capacity() * kNumShards, stride = std::max<uint64_t>(1, places / kSampleSize);
  for (uint64_t i = 0; i < places; i += stride) {
    const Entry& entry = entries[i];
    if (entry.is_empty() || entry.slot() == kNoSlot || entry.table() != table) continue;
    sample.push_back({rank_of(table, entry.slot()), entry.key, table, 0});
  }
  const uint64_t guess = sample.size() * count / std::max<uint64_t>(1, num_rows(table)) * 5 / 4 + 64;
  bool is_bounded = guess < sample.size();
  if (is_bounded) std::nth_element(sample.begin(), sample.begin() + static_cast<int64_t>(guess), sample.end(), is_before);
  std::vector<uint8_t> tables(policies_.size());
  tables[table] = 1;
  std::vector<std::vector<Leaver>> of_shard(kNumShards);
  uint64_t found = 0;
  for (;; is_bounded = false) {
    const auto leaves = [&](const Leaver& row, uint32_t slot) {
      return !stays[slot] && (!is_bounded || is_before(row, sample[guess]));
    };
    pool_.run(kNumShards, [&](int64_t shard, int) {
      of_shard[shard].clear();
      collect_leavers(static_cast<uint32_t>(shard), tables, leaves, &of_shard[shard]);
    });
    found = 0;
    for (const std::vector<Leaver>& leavers : of_shard) found += leavers.size();
    if (found >= count || !is_bounded) break;
  }
  Leaver last{};
  if (found > count) {
    std::vector<Leaver> all;
    all.reserve(found);
    for (const std::vector<Leaver>& leavers : of_shard) all.insert(all.end(), leavers.begin(), leavers.end());
    std::nth_element(all.begin(), all.begin() + static_cast<int64_t>(count), all.end(), is_before);
    last = all[count];
  }
  clear_tallies();
  pool_.run(kNumShards, [&](int64_t shard, int thread) {
    std::vector<Leaver>& leavers = of_shard[shard];
    if (found > count) std::erase_if(leavers, [&](const Leaver& leaver) { return !is_before(leaver, last); });
    count_evicted(leavers, scratch_[thread].tally);
    erase_rows(static_cast<uint32_t>(shard), leavers, &scratch_[thread].freed);
  });
  end_eviction();
}

// --- time --------------------------------------------------------------------------------------------------------------

void HostStore::advance(uint64_t step, uint64_t seconds) {
  if (!retains_) return;
  const std::lock_guard<std::mutex> guard(call_);
  std::vector<uint8_t> is_due(policies_.size()), halvings(policies_.size());
  bool some_due = false, some_halve = false;
  for (size_t table = 0; table < policies_.size(); ++table) {
    const RetentionPolicy& policy = policies_[table];
    RetentionNumbers& numbers = retention_[table];
    numbers.now = std::max(numbers.now, static_cast<int64_t>(policy.in_seconds ? seconds : step));
    if (policy.ttl != 0) {
      const int64_t period = static_cast<int64_t>(policy.sweep_period());
      if (numbers.now / period != numbers.swept / period) {
        numbers.swept = numbers.now;
        some_due = is_due[table] = 1;
      }
    }
    if (static_cast<int64_t>(step) <= numbers.step) continue;
    if (policy.min_count != 0) {
      int64_t times = numbers.candidates_are_full;
      if (policy.count_half_life != 0) {
        const int64_t half_life = static_cast<int64_t>(policy.count_half_life);
        times = std::max(times, std::min<int64_t>(static_cast<int64_t>(step) / half_life - numbers.step / half_life, 16));
      }
      numbers.candidates_are_full = 0;
      halvings[table] = static_cast<uint8_t>(times);
      some_halve |= times != 0;
    }
    numbers.step = static_cast<int64_t>(step);
  }
  step_ = std::max(step_, step);
  if (some_due) evict_expired(is_due);
  if (some_halve) halve_counts(halvings);
}

void HostStore::evict_expired(const std::vector<uint8_t>& tables) {
  clear_tallies();
  const auto leaves = [this](const Leaver& row, uint32_t) { return row.age > policies_[row.table].ttl; };
  pool_.run(kNumShards, [&](int64_t shard, int thread) {
    std::vector<Leaver> leavers;
    collect_leavers(static_cast<uint32_t>(shard), tables, leaves, &leavers);
    count_evicted(leavers, scratch_[thread].tally);
    erase_rows(static_cast<uint32_t>(shard), leavers, &scratch_[thread].freed);
  });
  end_eviction();
}

void HostStore::halve_counts(const std::vector<uint8_t>& halvings) {
  ++content_version_;
  clear_tallies();
  const uint64_t capacity = index_.capacity();
  pool_.run(kNumShards, [&](int64_t shard, int thread) {
    Entry* const entries = index_.view().entries + static_cast<uint64_t>(shard) * capacity;
    std::vector<std::pair<uint64_t, uint32_t>> forgotten;
    for (uint64_t i = 0; i < capacity; ++i) {
      if (entries[i].is_empty() || !entries[i].is_candidate()) continue;
      const uint32_t table = entries[i].table(), count = entries[i].count() >> halvings[table];
      entries[i].meta = Entry::pack_candidate(table, count);
      if (count == 0) forgotten.emplace_back(entries[i].key, table);
    }
    for (const auto& [key, table] : forgotten) {
      index_.erase(index_.find(key, table, index_.hash(key, table)));
      --scratch_[thread].tally[table].candidates;
    }
  });
  const std::vector<Tally> totals = total_tally();
  for (size_t table = 0; table < totals.size(); ++table) {
    candidates_of_table_[table] += static_cast<uint64_t>(totals[table].candidates);
  }
}

// --- checkpoints -------------------------------------------------------------------------------------------------------

Status HostStore::export_candidates(uint32_t table, uint64_t* cursor, uint64_t version, int64_t max_keys, int64_t* keys,
                                    int64_t* counts, int64_t* exported) {
  const std::lock_guard<std::mutex> guard(call_);
  if (version != content_version_) return Status::kStaleCursor;
  const Entry* const entries = index_.view().entries;
  const uint64_t end = index_.capacity() * kNumShards;
  for (*exported = 0; *cursor < end && *exported < max_keys; ++*cursor) {
    const Entry& entry = entries[*cursor];
    if (entry.is_empty() || !entry.is_candidate() || entry.table() != table) continue;
    keys[*exported] = static_cast<int64_t>(entry.key);
    counts[(*exported)++] = entry.count();
  }
  return Status::kOk;
}

Status HostStore::import_candidates(uint32_t table, const int64_t* keys, const int64_t* counts, int64_t count) {
  const std::lock_guard<std::mutex> guard(call_);
  ++content_version_;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t key = static_cast<uint64_t>(keys[i]), hash = index_.hash(key, table);
    const uint32_t shard = Index::shard_of(hash);
    const uint64_t meta = Entry::pack_candidate(table, static_cast<uint32_t>(counts[i]));
    if (Entry* const entry = index_.find(key, table, hash)) {
      if (entry->is_candidate()) entry->meta = meta;
      continue;
    }
    if (candidates_of_table_[table] >= policies_[table].max_candidates) return Status::kOverBudget;
    while (index_.is_full(shard)) {
      if (!index_.grow(pool_, growth_)) return Status::kOutOfMemory;
    }
    index_.insert(key, meta, hash);
    ++candidates_of_table_[table];
  }
  return Status::kOk;
}

RetentionNumbers HostStore::retention(uint32_t table, float* value, float* state) const {
  const std::lock_guard<std::mutex> guard(call_);
  if (default_slots_[table] != kNoSlot) {
    widen_values(type_, rows().value(default_slots_[table]), dim_, value);
    std::copy_n(rows().state(default_slots_[table]), state_dim_, state);
  }
  return retention_[table];
}

void HostStore::set_retention(uint32_t table, const RetentionNumbers& numbers, const float* value, const float* state) {
  const std::lock_guard<std::mutex> guard(call_);
  retention_[table] = numbers;
  step_ = std::max(step_, static_cast<uint64_t>(numbers.step));
  if (default_slots_[table] == kNoSlot) return;
  store_values(type_, value, dim_, rows().value(default_slots_[table]));
  std::copy_n(state, state_dim_, rows().state(default_slots_[table]));
}

}  // namespace penstock
