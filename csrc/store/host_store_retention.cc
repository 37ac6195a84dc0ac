// Which keys get rows, and what of it a checkpoint holds: admission, counts, budgets.
//
// All of it is decided for a whole call at once, by functions of keys, counts and times alone, so that neither the order
// of the keys nor the number of threads matters.
#include <algorithm>

#include "store/host_store.h"

namespace penstock {

void Tallies::clear() {
  for (const uint32_t table : touched_) of_table_[table] = Tally{};
  touched_.clear();
}

// Sums up what the threads have counted, and clears it.
Totals HostStore::take_totals() {
  Tallies& sum = scratch_[0].tallies;
  for (size_t thread = 1; thread < scratch_.size(); ++thread) {
    Tallies& theirs = scratch_[thread].tallies;
    for (const uint32_t table : theirs.touched()) {
      const Tally& one = theirs[table];
      Tally& total = sum[table];
      total.wanted += one.wanted;
      total.uncounted += one.uncounted;
      total.admitted += one.admitted;
      total.refused += one.refused;
      total.candidates += one.candidates;
    }
    theirs.clear();
  }
  Totals totals;
  totals.reserve(sum.touched().size());
  for (const uint32_t table : sum.touched()) totals.emplace_back(table, sum[table]);
  sum.clear();
  std::sort(totals.begin(), totals.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  return totals;
}

// --- admission ---------------------------------------------------------------------------------------------------------

Status HostStore::admit_misses(const std::vector<int64_t>& begin, bool admits_all, const std::vector<SlotSpan>& in_use) {
  pool_.run(kNumShards, [&](int64_t shard, int thread) {
    judge_shard(static_cast<uint32_t>(shard), begin[shard], begin[shard + 1], admits_all, scratch_[thread].tallies);
  });
  const Totals wishes = take_totals();
  const AtEnd forget([&] {
    for (const auto& [table, wish] : wishes) row_thresholds_[table] = candidate_thresholds_[table] = {};
  });
  make_room(wishes, in_use);
  reserve_lists(wishes);
  std::vector<int64_t> done(kNumShards);
  const Status status = insert_by_shard([&](uint32_t shard, int thread) {
    return admit_shard(shard, admits_all, scratch_[thread].tallies, &done[shard]);
  });
  list_newcomers();
  bool is_over_budget = false;
  for (const auto& [table, total] : take_totals()) {
    rows_of_table_[table] += static_cast<uint64_t>(total.admitted);
    candidates_of_table_[table] += static_cast<uint64_t>(total.candidates);
    if (admits_all) {
      is_over_budget |= total.refused != 0;
    } else {
      retention_[table].admitted += total.admitted;
      retention_[table].refused += total.refused;
    }
    tidy_if_worthwhile(table);
  }
  return status == Status::kOk && is_over_budget ? Status::kOverBudget : status;
}

// Finds the shard's distinct new keys, and which of them their table's rule admits.
void HostStore::judge_shard(uint32_t shard, int64_t first, int64_t last, bool admits_all, Tallies& tallies) {
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
    Tally& tally = tallies[table];
    tally.wanted += is_wanted;
    tally.uncounted += !is_wanted && !is_candidate && policy.min_count != 0;
    newcomers.push_back({key, table, static_cast<uint32_t>(std::min<uint64_t>(count, kMaxCount)), first, end, is_wanted,
                         is_candidate});
  }
}

// Evicts where rows are wanted beyond the budget; says who comes in where that is not enough.
void HostStore::make_room(const Totals& totals, const std::vector<SlotSpan>& in_use) {
  std::vector<Due> dues;
  for (const auto& [table, total] : totals) {
    const RetentionPolicy& policy = policies_[table];
    if (policy.max_rows == kUnlimited || !policy.evicts) continue;
    const uint64_t wanted = static_cast<uint64_t>(total.wanted), room = policy.max_rows - num_rows(table);
    if (wanted > room) dues.push_back({table, wanted - room + policy.max_rows / kEvictedBeyondNeed});
  }
  if (!dues.empty()) evict_lowest(dues, in_use);
  std::vector<Crowd> crowds;
  for (const auto& [table, total] : totals) {
    if (policies_[table].max_rows == kUnlimited) continue;
    const uint64_t wanted = static_cast<uint64_t>(total.wanted), room = policies_[table].max_rows - num_rows(table);
    if (wanted > room) crowds.push_back({table, room, wanted, {}});
  }
  set_thresholds(crowds, true);
  crowds.clear();
  for (const auto& [table, total] : totals) {
    if (policies_[table].max_rows == kUnlimited) continue;
    const uint64_t uncounted = static_cast<uint64_t>(total.uncounted);
    const uint64_t places = policies_[table].max_candidates - candidates_of_table_[table];
    if (uncounted > places) crowds.push_back({table, places, uncounted, {}});
  }
  // Those that get rows now give up their places.
  each_of_crowds(crowds, [this](const Newcomer& one, Crowd& crowd) {
    crowd.places += one.is_candidate && one.is_wanted && row_thresholds_[one.table].admits(precedence(one.key));
  });
  std::erase_if(crowds, [](const Crowd& crowd) { return crowd.size <= crowd.places; });
  for (const Crowd& crowd : crowds) {
    if (retention_[crowd.table].candidates_are_full == 0) full_tables_.push_back(crowd.table);
    retention_[crowd.table].candidates_are_full = 1;
  }
  set_thresholds(crowds, false);
}

template <typename Visit>
void HostStore::each_of_crowds(std::vector<Crowd>& crowds, const Visit& visit) {
  if (crowds.empty()) return;
  for (size_t i = 0; i < crowds.size(); ++i) number_of_table_[crowds[i].table] = static_cast<uint32_t>(i);
  for (const std::vector<Newcomer>& newcomers : newcomers_) {
    for (const Newcomer& one : newcomers) {
      const uint32_t number = number_of_table_[one.table];
      if (number != kNoNumber) visit(one, crowds[number]);
    }
  }
  for (const Crowd& crowd : crowds) number_of_table_[crowd.table] = kNoNumber;
}

// The precedence below which there are as many of a table's newcomers that want a row, or to be counted, as places.
void HostStore::set_thresholds(std::vector<Crowd>& crowds, bool of_rows) {
  for (Crowd& crowd : crowds) crowd.precedences.reserve(crowd.size);
  each_of_crowds(crowds, [of_rows](const Newcomer& one, Crowd& crowd) {
    if (of_rows ? one.is_wanted : !one.is_wanted && !one.is_candidate) crowd.precedences.push_back(precedence(one.key));
  });
  for (Crowd& crowd : crowds) {
    const auto last = crowd.precedences.begin() + static_cast<int64_t>(crowd.places);
    std::nth_element(crowd.precedences.begin(), last, crowd.precedences.end());
    (of_rows ? row_thresholds_ : candidate_thresholds_)[crowd.table] = {*last, true};
  }
}

// Memory for the keys that are new in lists, before there are any.
void HostStore::reserve_lists(const Totals& totals) {
  for (const auto& [table, total] : totals) {
    if (!is_listed(table) || !listed_[table].is_kept) continue;
    const RetentionPolicy& policy = policies_[table];
    uint64_t most = static_cast<uint64_t>(total.uncounted);
    if (policy.evicts) most += std::min(static_cast<uint64_t>(total.wanted), policy.max_rows - num_rows(table));
    listed_[table].keys.reserve(listed_[table].keys.size() + most);
  }
}

// After newcomers have got their entries.
void HostStore::list_newcomers() {
  for (const std::vector<Newcomer>& newcomers : newcomers_) {
    for (const Newcomer& one : newcomers) {
      if (!is_listed(one.table) || !listed_[one.table].is_kept) continue;
      const bool evicts = policies_[one.table].evicts;
      if (one.is_new && (evicts || !one.has_row)) listed_[one.table].keys.push_back(one.key);
      // A table that does not evict lists what is counted.
      listed_[one.table].dead += !evicts && one.has_row && !one.is_new;
    }
  }
}

Status HostStore::admit_shard(uint32_t shard, bool admits_all, Tallies& tallies, int64_t* done) {
  std::vector<Newcomer>& newcomers = newcomers_[shard];
  for (int64_t& i = *done; i < static_cast<int64_t>(newcomers.size()); ++i) {
    Newcomer& one = newcomers[i];
    const uint64_t rank = precedence(one.key);
    const uint64_t hash = index_.hash(one.key, one.table);
    // Evictions may have moved it since it was judged.
    Entry* const entry = policies_[one.table].min_count != 0 ? index_.find(one.key, one.table, hash) : nullptr;
    uint32_t slot = admits_all ? kNoSlot : default_slots_[one.table];
    Tally& tally = tallies[one.table];
    if (one.is_wanted && row_thresholds_[one.table].admits(rank)) {
      const Status status = give_row(shard, one, entry, hash, &slot);
      if (status != Status::kOk) return status;
      one.is_new = entry == nullptr;
      one.has_row = true;
      tally.candidates -= entry != nullptr;
      ++tally.admitted;
    } else {
      if (entry != nullptr && !admits_all) {
        entry->meta = Entry::pack_candidate(one.table, one.count);
      } else if (policies_[one.table].min_count != 0 && !one.is_wanted && candidate_thresholds_[one.table].admits(rank)) {
        if (index_.is_full(shard)) return Status::kIndexFull;
        index_.insert(one.key, Entry::pack_candidate(one.table, one.count), hash);
        one.is_new = true;
        ++tally.candidates;
      }
      tally.refused += one.last - one.first;
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
    rows().usage(row)[0] = static_cast<uint32_t>(now_of(newcomer.table));
    if (usage_dim_ == 2) rows().usage(row)[1] = 0;
  }
  const uint64_t meta = Entry::pack(newcomer.table, row);
  if (entry != nullptr) {
    entry->meta = meta;
  } else {
    index_.insert(newcomer.key, meta, hash);
  }
  return Status::kOk;
}

// --- checkpoints -------------------------------------------------------------------------------------------------------

Status HostStore::import_candidates(uint32_t table, const int64_t* keys, const int64_t* counts, int64_t count) {
  if (policies_[table].min_count == 0) return Status::kOk;  // it does not count
  return call([&] { return count_keys(table, keys, counts, count); });
}

Status HostStore::count_keys(uint32_t table, const int64_t* keys, const int64_t* counts, int64_t count) {
  content_changed();
  Listed& listed = listed_[table];
  if (listed.is_kept) listed.keys.reserve(listed.keys.size() + static_cast<uint64_t>(count));
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
    if (listed.is_kept) listed.keys.push_back(key);
    ++candidates_of_table_[table];
  }
  return Status::kOk;
}

RetentionNumbers HostStore::retention(uint32_t table, float* value, float* state) const {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  if (default_slots_[table] != kNoSlot) {
    widen_values(type_, rows().value(default_slots_[table]), dim_, value);
    std::copy_n(rows().state(default_slots_[table]), state_dim_, state);
  }
  return numbers_of(table);
}

RetentionNumbers HostStore::numbers_of(uint32_t table) const {
  RetentionNumbers numbers = retention_[table];
  numbers.now = now_of(table);
  numbers.step = step_of(table);
  return numbers;
}

void HostStore::counters(int64_t* rows, int64_t* candidates, RetentionNumbers* numbers) const {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  for (uint32_t table = 0; table < policies_.size(); ++table) {
    rows[table] = static_cast<int64_t>(num_rows(table));
    candidates[table] = static_cast<int64_t>(candidates_of_table_[table]);
    numbers[table] = retains_ ? numbers_of(table) : RetentionNumbers{};
  }
}

void HostStore::set_retention(uint32_t table, const RetentionNumbers& numbers, const float* value, const float* state) {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  retention_[table] = numbers;
  follows_[table] = false;
  next_step_ = next_second_ = 0;
  step_ = std::max(step_, static_cast<uint64_t>(numbers.step));
  if (default_slots_[table] == kNoSlot) return;
  store_values(type_, value, dim_, rows().value(default_slots_[table]));
  std::copy_n(state, state_dim_, rows().state(default_slots_[table]));
}

}  // namespace penstock
