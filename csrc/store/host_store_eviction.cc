// Which rows leave: eviction and ageing. Exact, and by functions of keys, marks of use and times alone.
//
// A table is looked through by its list of keys or, where it is much of the index, by the index; many tables and the parts of
// large ones side by side. Keys that leave are then taken out of the index, whose shards threads own one at a time.
#include <algorithm>
#include <functional>
#include <utility>

#include "store/host_store.h"

namespace penstock {
namespace {

constexpr uint64_t kStretch = 8192;           // keys of a task
constexpr uint64_t kSampleSize = 1 << 14;     // keys
constexpr uint64_t kSweptAtOnce = 1 << 20;    // keys whose leavers are kept in memory together
constexpr uint64_t kMostDead = 64;            // dead keys of a list that are not worth dropping
constexpr uint64_t kPlacesAKey = 8;           // with no more places of the index for each key of a table, a list is slower

}  // namespace

// --- lists of keys -----------------------------------------------------------------------------------------------------

void HostStore::tidy(uint32_t table) {
  Listed& listed = listed_[table];
  if (listed.dead == 0) return;
  if (listed.repeats) {
    std::vector<uint64_t> keys(listed.keys.size());
    for (uint64_t i = 0; i < keys.size(); ++i) keys[i] = listed.keys[i];
    std::sort(keys.begin(), keys.end());
    keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
    listed.keys.clear();
    for (const uint64_t key : keys) listed.keys.push_back(key);
  }
  for (uint64_t i = listed.keys.size(); i-- > 0;) {
    const uint64_t key = listed.keys[i];
    const Entry* const entry = index_.find(key, table, index_.hash(key, table));
    if (entry == nullptr || !(policies_[table].evicts || entry->is_candidate())) listed.keys.remove(i);
  }
  listed.dead = 0;
  listed.repeats = false;
}

// So seldom that it costs a few steps for each key that died.
void HostStore::tidy_if_worthwhile(uint32_t table) {
  if (listed_[table].dead > listed_[table].keys.size() / 4 + kMostDead) tidy(table);
}

void HostStore::choose_ways(const std::vector<uint32_t>& tables) {
  std::vector<uint32_t> without;
  for (const uint32_t table : tables) {
    Listed& listed = listed_[table];
    tidy(table);
    // It may be twice as far off before the other way is taken: the index has doubled, or half of the table has left.
    if (listed.is_kept && num_places() >= scan_from_ && num_listed(table) * kPlacesAKey >= num_places()) {
      listed = Listed{false, {}, 0, false};
      content_changed();  // cursors have another meaning
    } else if (!listed.is_kept && num_listed(table) * kPlacesAKey * 2 < num_places()) {
      without.push_back(table);
    }
  }
  if (without.empty()) return;
  content_changed();
  for (const uint32_t table : without) listed_[table].keys.reserve(num_listed(table));
  for (const uint32_t table : without) number_of_table_[table] = 0;
  const Entry* const entries = index_.view().entries;
  for (uint64_t place = 0; place < num_places(); ++place) {
    const Entry& entry = entries[place];
    if (entry.is_empty() || number_of_table_[entry.table()] == kNoNumber) continue;
    if (policies_[entry.table()].evicts || entry.is_candidate()) listed_[entry.table()].keys.push_back(entry.key);
  }
  for (const uint32_t table : without) {
    number_of_table_[table] = kNoNumber;
    listed_[table].is_kept = true;
  }
}

template <typename Visit>
void HostStore::each_place(uint32_t table, uint64_t first, uint64_t last, uint64_t stride, const Visit& visit) const {
  const uint64_t ahead = 32 * stride;
  const Entry* const entries = index_.view().entries;
  const bool evicts = policies_[table].evicts, has_marks = usage_dim_ != 0;
  const Rows marked = rows();  // by value: what visits write is nothing of it
  // An empty entry is of no table.
  const auto is_theirs = [&](const Entry& entry) {
    return entry.table() == table && !entry.is_empty() && (evicts || entry.slot() == kNoSlot);
  };
  for (uint64_t place = first; place < last; place += stride) {
    if (has_marks && ahead < last - place) {
      const Entry& later = entries[place + ahead];
      if (is_theirs(later) && later.slot() != kNoSlot) __builtin_prefetch(marked.usage(later.slot()));
    }
    if (is_theirs(entries[place])) visit(entries + place, place);
  }
}

template <typename Visit>
void HostStore::each_listed(uint32_t table, uint64_t first, uint64_t last, uint64_t stride, const Visit& visit) const {
  // Three groups are under way: one whose lines of the index are on their way, one whose marks of use are, one at hand.
  constexpr uint64_t kGroup = 16;
  const IndexView index = index_.view();
  const KeyList& keys = listed_[table].keys;
  struct Group {
    uint64_t position, size;
    uint64_t hashes[kGroup];
    const Entry* entries[kGroup];
  };
  Group groups[3];
  for (Group& group : groups) group.size = 0;
  const uint64_t number = first < last ? (last - first + stride - 1) / stride : 0;
  const uint64_t rounds = (number + kGroup - 1) / kGroup + 2;
  for (uint64_t round = 0; round < rounds; ++round) {
    Group& next = groups[round % 3];
    next.position = first + round * kGroup * stride;
    next.size = round * kGroup < number ? std::min(kGroup, number - round * kGroup) : 0;
    for (uint64_t i = 0; i < next.size; ++i) {
      next.hashes[i] = index.hash(keys[next.position + i * stride], table);
      __builtin_prefetch(index.shard(next.hashes[i]) + index.home(next.hashes[i]));
    }
    Group& found = groups[(round + 2) % 3];
    for (uint64_t i = 0; i < found.size; ++i) {
      found.entries[i] = index_.find(keys[found.position + i * stride], table, found.hashes[i]);
      const uint32_t slot = found.entries[i]->slot();
      if (usage_dim_ != 0 && slot != kNoSlot) __builtin_prefetch(rows().usage(slot));
    }
    Group& ready = groups[(round + 1) % 3];
    for (uint64_t i = 0; i < ready.size; ++i) visit(ready.entries[i], ready.position + i * stride);
    ready.size = 0;
  }
}

Status HostStore::export_candidates(uint32_t table, uint64_t* cursor, uint64_t version, int64_t max_keys, int64_t* keys,
                                    int64_t* counts, int64_t* exported) {
  return call([&] { return copy_counts(table, cursor, version, max_keys, keys, counts, exported); });
}

Status HostStore::copy_counts(uint32_t table, uint64_t* cursor, uint64_t version, int64_t max_keys, int64_t* keys,
                              int64_t* counts, int64_t* exported) {
  if (version != content_version_) return Status::kStaleCursor;
  *exported = 0;
  if (!is_listed(table)) return Status::kOk;
  tidy(table);
  const uint64_t size = listed_[table].is_kept ? listed_[table].keys.size() : num_places();
  while (*cursor < size && *exported < max_keys) {
    // No more than there is room for.
    const uint64_t last = std::min(size, *cursor + static_cast<uint64_t>(max_keys - *exported));
    each_entry(table, *cursor, last, 1, [&](const Entry* entry, uint64_t) {
      if (!entry->is_candidate()) return;
      keys[*exported] = static_cast<int64_t>(entry->key);
      counts[(*exported)++] = entry->count();
    });
    *cursor = last;
  }
  return Status::kOk;
}

void HostStore::remove_keys(std::vector<std::vector<Leaver>>& of_tables) {
  // All memory is taken before the first key leaves. By shard.
  std::vector<uint64_t> begin(kNumShards + 1), next(kNumShards);
  const auto shard_of = [this](const Leaver& leaver) { return Index::shard_of(index_.hash(leaver.key, leaver.table)); };
  for (const std::vector<Leaver>& leavers : of_tables) {
    for (const Leaver& leaver : leavers) ++begin[shard_of(leaver) + 1];
  }
  for (uint32_t shard = 0; shard < kNumShards; ++shard) next[shard] = begin[shard + 1] += begin[shard];
  std::vector<std::pair<uint64_t, uint32_t>> keys(begin.back());
  std::vector<uint32_t>& freed = scratch_[0].freed;
  const size_t freed_before = freed.size();
  for (const std::vector<Leaver>& leavers : of_tables) {
    for (const Leaver& leaver : leavers) keys[--next[shard_of(leaver)]] = {leaver.key, leaver.table};
  }
  const std::function<void(int64_t, int)> remove_from_list = [&](int64_t number, int) {
    std::vector<Leaver>& leavers = of_tables[number];
    if (leavers.empty() || !listed_[leavers.front().table].is_kept) return;
    // From the end, so that the keys which take the places of those removed stay.
    std::sort(leavers.begin(), leavers.end(), [](const Leaver& a, const Leaver& b) { return a.position > b.position; });
    for (const Leaver& leaver : leavers) listed_[leaver.table].keys.remove(leaver.position);
  };
  const std::function<void(int64_t, int)> erase_from_shard = [&](int64_t shard, int) {
    constexpr uint64_t kAhead = 8;
    const IndexView index = index_.view();
    for (uint64_t i = begin[shard]; i < begin[shard + 1]; ++i) {
      if (i + kAhead < begin[shard + 1]) {
        const uint64_t hash = index.hash(keys[i + kAhead].first, keys[i + kAhead].second);
        __builtin_prefetch(index.shard(hash) + index.home(hash), 1);
      }
      const auto [key, table] = keys[i];
      Entry* const entry = index_.find(key, table, index.hash(key, table));
      freed[freed_before + i] = entry->slot();
      index_.erase(entry);
    }
    // The last are taken first: rows that come together lie side by side.
    const auto first = freed.begin() + static_cast<int64_t>(freed_before);
    std::sort(first + static_cast<int64_t>(begin[shard]), first + static_cast<int64_t>(begin[shard + 1]), std::greater<>());
  };
  freed.resize(freed_before + begin.back(), kNoSlot);
  pool_.run(static_cast<int64_t>(of_tables.size()), remove_from_list);
  pool_.run(kNumShards, erase_from_shard);
  std::erase(freed, kNoSlot);
  bool has_rows = false;
  for (const std::vector<Leaver>& leavers : of_tables) {
    for (const Leaver& leaver : leavers) {
      if (leaver.slot == kNoSlot) {
        --candidates_of_table_[leaver.table];
        continue;
      }
      has_rows = true;
      --rows_of_table_[leaver.table];
      ++retention_[leaver.table].evicted;
      retention_[leaver.table].evicted_age += leaver.age;
    }
  }
  if (has_rows) {
    return_freed_slots();
  } else {
    content_changed();
  }
}

// --- eviction ----------------------------------------------------------------------------------------------------------

void HostStore::mark_used(const uint32_t* slots, int64_t count, uint32_t table) {
  const uint64_t now = static_cast<uint64_t>(now_of(table));
  for (int64_t i = 0; i < count; ++i) {
    uint32_t* const marks = rows().usage(slots[i]);
    if (usage_dim_ == 2) {
      const uint32_t uses = policies_[table].aged_uses(marks[1], marks[0], now);
      marks[1] = uses + (uses != ~0u);
    }
    marks[0] = static_cast<uint32_t>(now);
  }
}

namespace {

// Rows leave in ascending order of (rank, precedence of the key).
struct RankOf {
  Rows rows;
  RetentionPolicy policy;
  uint64_t now;

  uint64_t operator()(uint32_t slot) const {
    const uint32_t* const marks = rows.usage(slot);
    if (!policy.by_uses) return marks[0];
    return marks[0] | uint64_t{policy.aged_uses(marks[1], marks[0], now)} << 32;
  }
};

}  // namespace

Leaver HostStore::leaver_of(uint32_t table, const Entry& entry, uint64_t position, int64_t now) const {
  const uint32_t slot = entry.slot();
  const uint64_t rank = RankOf{rows(), policies_[table], static_cast<uint64_t>(now)}(slot);
  const int64_t age = std::max<int64_t>(0, now - int64_t{rows().usage(slot)[0]});
  return {rank, entry.key, position, table, slot, static_cast<uint32_t>(age)};
}

std::vector<Stretch> HostStore::stretches(const std::vector<Due>& dues) const {
  std::vector<Stretch> parts;
  for (size_t due = 0; due < dues.size(); ++due) {
    if (dues[due].found >= dues[due].count) continue;
    const Listed& listed = listed_[dues[due].table];
    const uint64_t size = listed.is_kept ? listed.keys.size() : num_places();
    const uint64_t stretch = listed.is_kept ? kStretch : index_.capacity();
    for (uint64_t first = 0; first < size; first += stretch) {
      parts.push_back({due, dues[due].table, first, std::min(first + stretch, size)});
    }
  }
  return parts;
}

void HostStore::mark_in_use(const std::vector<Due>& dues, const std::vector<SlotSpan>& in_use, bool is_in_use) {
  in_use_bits_.resize((slots_handed_out_ + 63) / 64);
  for (const Due& due : dues) number_of_table_[due.table] = 0;
  for (const SlotSpan& span : in_use) {
    if (number_of_table_[span.table] == kNoNumber) continue;
    for (int64_t i = 0; i < span.count; ++i) {
      const uint32_t slot = span.slots[i];
      if (slot == kNoSlot) continue;
      const uint64_t bit = uint64_t{1} << (slot % 64);
      uint64_t& word = in_use_bits_[slot / 64];
      word = is_in_use ? word | bit : word & ~bit;
    }
  }
  for (const Due& due : dues) number_of_table_[due.table] = kNoNumber;
}

static bool leaves_before(uint64_t rank, uint64_t key, uint64_t other_rank, uint64_t other_key) {
  return rank != other_rank ? rank < other_rank : precedence(key) < precedence(other_key);
}

// A sample says about which row of a long table is the last to leave; so few rows need keeping to compare them.
void HostStore::guess_bound(Due& due) const {
  const Listed& listed = listed_[due.table];
  const uint64_t size = listed.is_kept ? listed.keys.size() : num_places();
  if (num_listed(due.table) < kSampleSize) return;
  const uint64_t stride = std::max<uint64_t>(1, size / std::min(kSampleSize, num_listed(due.table) / 16));
  std::vector<Leaver> sample;
  const int64_t now = now_of(due.table);
  each_entry(due.table, 0, size, stride, [&](const Entry* entry, uint64_t position) {
    if (entry->slot() != kNoSlot) sample.push_back(leaver_of(due.table, *entry, position, now));
  });
  const uint64_t guess = sample.size() * due.count / std::max<uint64_t>(1, num_rows(due.table)) * 5 / 4 + 64;
  if (guess >= sample.size()) return;
  const auto last = sample.begin() + static_cast<int64_t>(guess);
  std::nth_element(sample.begin(), last, sample.end(), [](const Leaver& a, const Leaver& b) {
    return leaves_before(a.rank, a.key, b.rank, b.key);
  });
  due.is_bounded = true;
  due.bound = *last;
}

void HostStore::keep_lowest(std::vector<Leaver>& leavers, uint64_t count) {
  if (leavers.size() <= count) return;
  std::nth_element(leavers.begin(), leavers.begin() + static_cast<int64_t>(count), leavers.end(),
                   [](const Leaver& a, const Leaver& b) { return leaves_before(a.rank, a.key, b.rank, b.key); });
  leavers.resize(count);
}

void HostStore::evict_lowest(std::vector<Due>& dues, const std::vector<SlotSpan>& in_use) {
  std::vector<uint32_t> tables;
  for (const Due& due : dues) tables.push_back(due.table);
  choose_ways(tables);
  const AtEnd unmark([&] { mark_in_use(dues, in_use, false); });
  mark_in_use(dues, in_use, true);
  pool_.run(static_cast<int64_t>(dues.size()), [&](int64_t number, int) { guess_bound(dues[number]); });
  std::vector<std::vector<Leaver>> leaving(dues.size());
  for (std::vector<Stretch> parts = stretches(dues); !parts.empty();) {
    std::vector<std::vector<Leaver>> found(parts.size());
    pool_.run(static_cast<int64_t>(parts.size()), [&](int64_t number, int thread) {
      const Stretch& part = parts[number];
      const Due& due = dues[part.due];
      std::vector<Leaver>& leavers = scratch_[thread].leavers;
      leavers.clear();
      const int64_t now = now_of(part.table);
      const uint64_t* const in_use_bits = in_use_bits_.data();
      const uint64_t highest = due.is_bounded ? due.bound.rank : ~uint64_t{0};
      const RankOf rank_of{rows(), policies_[part.table], static_cast<uint64_t>(now)};
      each_entry(part.table, part.first, part.last, 1, [&](const Entry* entry, uint64_t position) {
        const uint32_t slot = entry->slot();
        if (slot == kNoSlot || rank_of(slot) > highest) return;
        if ((in_use_bits[slot / 64] >> (slot % 64) & 1) != 0) return;
        const Leaver row = leaver_of(part.table, *entry, position, now);
        if (due.is_bounded && !leaves_before(row.rank, row.key, due.bound.rank, due.bound.key)) return;
        leavers.push_back(row);
      });
      keep_lowest(leavers, due.count);
      found[number] = leavers;
    });
    for (size_t number = 0; number < parts.size(); ++number) {
      std::vector<Leaver>& leavers = leaving[parts[number].due];
      if (parts[number].first == 0) leavers.clear();
      leavers.insert(leavers.end(), found[number].begin(), found[number].end());
    }
    // Again without a bound, where the sample misled.
    std::vector<size_t> again;
    for (const Stretch& part : parts) {
      if (part.first == 0 && dues[part.due].is_bounded && leaving[part.due].size() < dues[part.due].count) {
        again.push_back(part.due);
      }
    }
    for (Due& due : dues) due.found = due.count;
    for (const size_t due : again) dues[due] = {dues[due].table, dues[due].count};
    parts = stretches(dues);
  }
  pool_.run(static_cast<int64_t>(dues.size()), [&](int64_t number, int) { keep_lowest(leaving[number], dues[number].count); });
  remove_keys(leaving);
}

// Calls judge(part, entry, position, list) for all keys of some tables, which adds to the list what may leave; then, with no
// other reader about, settle(list), which keeps what does leave.
template <typename Judge, typename Settle>
void HostStore::sweep(const std::vector<uint32_t>& tables, const Judge& judge, const Settle& settle) {
  std::vector<Stretch> parts;
  uint64_t size = 0;
  const auto look_through = [&] {
    std::vector<std::vector<Leaver>> leaving(parts.size());
    pool_.run(static_cast<int64_t>(parts.size()), [&](int64_t number, int) {
      const Stretch& part = parts[number];
      each_entry(part.table, part.first, part.last, 1, [&](const Entry* entry, uint64_t position) {
        judge(part, *entry, position, &leaving[number]);
      });
    });
    pool_.run(static_cast<int64_t>(parts.size()), [&](int64_t number, int) { settle(parts[number], &leaving[number]); });
    // Parts of one table come one after the other: their keys are removed together, from the end.
    for (size_t number = parts.size(); number-- > 1;) {
      if (parts[number].due != parts[number - 1].due) continue;
      leaving[number - 1].insert(leaving[number - 1].end(), leaving[number].begin(), leaving[number].end());
      std::vector<Leaver>().swap(leaving[number]);
    }
    std::erase_if(leaving, [](const std::vector<Leaver>& leavers) { return leavers.empty(); });
    if (!leaving.empty()) remove_keys(leaving);
    parts.clear();
    size = 0;
  };
  choose_ways(tables);
  for (size_t number = 0; number < tables.size(); ++number) {
    const Listed& listed = listed_[tables[number]];
    // Of the index whole shards, within which entries move. Of a list from the end: what is removed is replaced by keys that
    // were looked at.
    const uint64_t stretch = listed.is_kept ? kStretch : index_.capacity();
    for (uint64_t last = listed.is_kept ? listed.keys.size() : num_places(); last > 0;) {
      const uint64_t first = (last - 1) / stretch * stretch;
      parts.push_back({number, tables[number], first, last});
      size += last - first;
      last = first;
      if (size >= kSweptAtOnce) look_through();
    }
  }
  if (!parts.empty()) look_through();
}

void HostStore::evict_expired(const std::vector<uint32_t>& tables) {
  const auto judge = [this](const Stretch& part, const Entry& entry, uint64_t position, std::vector<Leaver>* leavers) {
    if (entry.slot() == kNoSlot) return;
    const Leaver row = leaver_of(part.table, entry, position, now_of(part.table));
    if (row.age > policies_[part.table].ttl) leavers->push_back(row);
  };
  sweep(tables, judge, [](const Stretch&, std::vector<Leaver>*) {});
}

void HostStore::halve_counts(const std::vector<std::pair<uint32_t, uint32_t>>& halvings) {
  content_changed();
  std::vector<uint32_t> tables;
  for (const auto& [table, times] : halvings) tables.push_back(table);
  Entry* const entries = index_.view().entries;
  const auto judge = [&](const Stretch& part, const Entry& entry, uint64_t position, std::vector<Leaver>* leavers) {
    if (!entry.is_candidate()) return;
    const uint64_t place = static_cast<uint64_t>(&entry - entries);
    leavers->push_back({place, entry.key, position, part.table, kNoSlot, entry.count() >> halvings[part.due].second});
  };
  const auto settle = [&](const Stretch& part, std::vector<Leaver>* leavers) {
    for (const Leaver& counted : *leavers) {
      if (counted.age != 0) entries[counted.rank].meta = Entry::pack_candidate(part.table, counted.age);
    }
    std::erase_if(*leavers, [](const Leaver& counted) { return counted.age != 0; });
  };
  sweep(tables, judge, settle);
}

}  // namespace penstock
