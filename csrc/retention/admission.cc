// Which keys get rows, and which are counted.
#include "retention/admission.h"

#include <algorithm>

#include "system/at_end.h"

namespace penstock {

Status Admission::admit(const SortedMisses& misses, bool admits_all, const std::vector<SlotSpan>& in_use) {
  rows_.pool.run(kNumShards, [&](int64_t shard, int thread) {
    judge_shard(static_cast<uint32_t>(shard), misses, admits_all, tallies_[thread]);
  });
  const Totals wishes = Tallies::take(tallies_);
  const AtEnd forget([&] {
    for (const auto& [table, wish] : wishes) row_thresholds_[table] = candidate_thresholds_[table] = {};
  });
  make_room(wishes, in_use);
  reserve_lists(wishes);
  std::vector<int64_t> done(kNumShards);
  const Status status = rows_.insert_by_shard([&](uint32_t shard, int thread) {
    return admit_shard(shard, misses.all, admits_all, tallies_[thread], &done[shard]);
  });
  list_newcomers();
  bool is_over_budget = false;
  for (const auto& [table, total] : Tallies::take(tallies_)) {
    rows_.tables.rows[table] += static_cast<uint64_t>(total.admitted);
    rows_.tables.candidates[table] += static_cast<uint64_t>(total.candidates);
    if (admits_all) {
      is_over_budget |= total.refused != 0;
    } else {
      rows_.tables.numbers[table].admitted += total.admitted;
      rows_.tables.numbers[table].refused += total.refused;
    }
    lists_.tidy_if_worthwhile(table);
  }
  return status == Status::kOk && is_over_budget ? Status::kOverBudget : status;
}

// Finds the shard's distinct new keys, and which of them their table's rule admits.
void Admission::judge_shard(uint32_t shard, const SortedMisses& sorted, bool admits_all, Tallies& tallies) {
  std::vector<Newcomer>& newcomers = newcomers_[shard];
  newcomers.clear();
  Miss* const misses = sorted.all;
  int64_t first = sorted.begin[shard];
  const int64_t last = sorted.begin[shard + 1];
  std::sort(misses + first, misses + last, [](const Miss& a, const Miss& b) {
    return a.key != b.key ? a.key < b.key : a.table < b.table;
  });
  for (int64_t end; first < last; first = end) {
    const auto [key, table, slot] = misses[first];
    for (end = first + 1; end < last && misses[end].key == key && misses[end].table == table;) ++end;
    const RetentionPolicy& policy = rows_.tables.policies[table];
    uint64_t count = static_cast<uint64_t>(end - first);
    bool is_candidate = false;
    if (policy.min_count != 0) {
      const Entry* const entry = rows_.index.find(key, table, rows_.index.hash(key, table));
      is_candidate = entry != nullptr;
      if (is_candidate) count += entry->count();
    }
    const bool is_wanted = admits_all || (count >= policy.min_count && policy.draws(key, clock_.draw_step()));
    Tally& tally = tallies[table];
    tally.wanted += is_wanted;
    tally.uncounted += !is_wanted && !is_candidate && policy.min_count != 0;
    newcomers.push_back({key, table, static_cast<uint32_t>(std::min<uint64_t>(count, kMaxCount)), first, end, is_wanted,
                         is_candidate});
  }
}

// Evicts where rows are wanted beyond the budget; says who comes in where that is not enough.
void Admission::make_room(const Totals& totals, const std::vector<SlotSpan>& in_use) {
  std::vector<Due> dues;
  for (const auto& [table, total] : totals) {
    const RetentionPolicy& policy = rows_.tables.policies[table];
    if (policy.max_rows == kUnlimited || !policy.evicts) continue;
    const uint64_t wanted = static_cast<uint64_t>(total.wanted), room = policy.max_rows - rows_.tables.num_rows(table);
    if (wanted > room) dues.push_back({table, wanted - room + policy.max_rows / kEvictedBeyondNeed});
  }
  if (!dues.empty()) eviction_.evict_lowest(dues, in_use);
  std::vector<Crowd> crowds;
  for (const auto& [table, total] : totals) {
    if (rows_.tables.policies[table].max_rows == kUnlimited) continue;
    const uint64_t wanted = static_cast<uint64_t>(total.wanted), room = rows_.tables.policies[table].max_rows - rows_.tables.num_rows(table);
    if (wanted > room) crowds.push_back({table, room, wanted, {}});
  }
  set_thresholds(crowds, true);
  crowds.clear();
  for (const auto& [table, total] : totals) {
    if (rows_.tables.policies[table].max_rows == kUnlimited) continue;
    const uint64_t uncounted = static_cast<uint64_t>(total.uncounted);
    const uint64_t places = rows_.tables.policies[table].max_candidates - rows_.tables.candidates[table];
    if (uncounted > places) crowds.push_back({table, places, uncounted, {}});
  }
  // Those that get rows now give up their places.
  each_of_crowds(crowds, [this](const Newcomer& one, Crowd& crowd) {
    crowd.places += one.is_candidate && one.is_wanted && row_thresholds_[one.table].admits(precedence(one.key));
  });
  std::erase_if(crowds, [](const Crowd& crowd) { return crowd.size <= crowd.places; });
  for (const Crowd& crowd : crowds) clock_.note_full(crowd.table);
  set_thresholds(crowds, false);
}

template <typename Visit>
void Admission::each_of_crowds(std::vector<Crowd>& crowds, const Visit& visit) {
  if (crowds.empty()) return;
  for (size_t i = 0; i < crowds.size(); ++i) crowd_of_table_[crowds[i].table] = static_cast<uint32_t>(i);
  for (const std::vector<Newcomer>& newcomers : newcomers_) {
    for (const Newcomer& one : newcomers) {
      const uint32_t number = crowd_of_table_[one.table];
      if (number != kNoCrowd) visit(one, crowds[number]);
    }
  }
  for (const Crowd& crowd : crowds) crowd_of_table_[crowd.table] = kNoCrowd;
}

// The precedence below which there are as many of a table's newcomers that want a row, or to be counted, as places.
void Admission::set_thresholds(std::vector<Crowd>& crowds, bool of_rows) {
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
void Admission::reserve_lists(const Totals& totals) {
  for (const auto& [table, total] : totals) {
    if (!lists_.has_keys(table) || !lists_.is_kept(table)) continue;
    const RetentionPolicy& policy = rows_.tables.policies[table];
    uint64_t most = static_cast<uint64_t>(total.uncounted);
    if (policy.evicts) most += std::min(static_cast<uint64_t>(total.wanted), policy.max_rows - rows_.tables.num_rows(table));
    lists_.reserve(table, most);
  }
}

// After newcomers have got their entries.
void Admission::list_newcomers() {
  for (const std::vector<Newcomer>& newcomers : newcomers_) {
    for (const Newcomer& one : newcomers) {
      if (!lists_.has_keys(one.table) || !lists_.is_kept(one.table)) continue;
      const bool evicts = rows_.tables.policies[one.table].evicts;
      if (one.is_new && (evicts || !one.has_row)) lists_.add(one.table, one.key);
      // A table that does not evict lists what is counted.
      if (!evicts && one.has_row && !one.is_new) lists_.note_dead(one.table, 1, false);
    }
  }
}

Status Admission::admit_shard(uint32_t shard, const Miss* misses, bool admits_all, Tallies& tallies, int64_t* done) {
  std::vector<Newcomer>& newcomers = newcomers_[shard];
  for (int64_t& i = *done; i < static_cast<int64_t>(newcomers.size()); ++i) {
    Newcomer& one = newcomers[i];
    const uint64_t rank = precedence(one.key);
    const uint64_t hash = rows_.index.hash(one.key, one.table);
    // Evictions may have moved it since it was judged.
    Entry* const entry = rows_.tables.policies[one.table].min_count != 0 ? rows_.index.find(one.key, one.table, hash) : nullptr;
    uint32_t slot = admits_all ? kNoSlot : rows_.tables.default_slots[one.table];
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
      } else if (rows_.tables.policies[one.table].min_count != 0 && !one.is_wanted && candidate_thresholds_[one.table].admits(rank)) {
        if (rows_.index.is_full(shard)) return Status::kIndexFull;
        rows_.index.insert(one.key, Entry::pack_candidate(one.table, one.count), hash);
        one.is_new = true;
        ++tally.candidates;
      }
      tally.refused += one.last - one.first;
    }
    for (int64_t miss = one.first; miss < one.last; ++miss) *misses[miss].slot = slot;
  }
  return Status::kOk;
}

Status Admission::give_row(uint32_t shard, const Newcomer& newcomer, Entry* entry, uint64_t hash, uint32_t* slot) {
  if (entry == nullptr && rows_.index.is_full(shard)) return Status::kIndexFull;
  uint32_t row;
  const Status status = rows_.slots.take(shard, &row);
  if (status != Status::kOk) return status;
  *slot = row;
  rows_.initialize(newcomer.table, newcomer.key, row);
  if (rows_.layout.usage_dim != 0) {
    uint32_t* const marks = rows_.rows().usage(row);
    marks[0] = static_cast<uint32_t>(clock_.now(newcomer.table));
    if (rows_.layout.usage_dim == 2) marks[1] = 0;
  }
  const uint64_t meta = Entry::pack(newcomer.table, row);
  if (entry != nullptr) {
    entry->meta = meta;
  } else {
    rows_.index.insert(newcomer.key, meta, hash);
  }
  return Status::kOk;
}

Status Admission::count_keys(uint32_t table, const int64_t* keys, const int64_t* counts, int64_t count) {
  rows_.order.keys_changed();
  lists_.reserve(table, static_cast<uint64_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t key = static_cast<uint64_t>(keys[i]), hash = rows_.index.hash(key, table);
    const uint32_t shard = Index::shard_of(hash);
    const uint64_t meta = Entry::pack_candidate(table, static_cast<uint32_t>(counts[i]));
    if (Entry* const entry = rows_.index.find(key, table, hash)) {
      if (entry->is_candidate()) entry->meta = meta;
      continue;
    }
    if (rows_.tables.candidates[table] >= rows_.tables.policies[table].max_candidates) return Status::kOverBudget;
    while (rows_.index.is_full(shard)) {
      if (!rows_.index.grow(rows_.pool, rows_.growth)) return Status::kOutOfMemory;
    }
    rows_.index.insert(key, meta, hash);
    lists_.add(table, key);
    ++rows_.tables.candidates[table];
  }
  return Status::kOk;
}

void Admission::reset() noexcept {
  for (Tallies& tallies : tallies_) tallies.clear();
  std::fill(row_thresholds_.begin(), row_thresholds_.end(), Threshold{});
  std::fill(candidate_thresholds_.begin(), candidate_thresholds_.end(), Threshold{});
  std::fill(crowd_of_table_.begin(), crowd_of_table_.end(), kNoCrowd);
}

}  // namespace penstock
