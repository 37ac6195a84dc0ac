// Rows that leave: chosen exactly, from a sample's bound where a table is long.
#include "retention/eviction.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "system/at_end.h"

namespace penstock {
namespace {

constexpr uint64_t kStretch = 8192;           // keys of a task
constexpr uint64_t kSampleSize = 1 << 14;     // keys
constexpr uint64_t kSweptAtOnce = 1 << 20;    // keys whose leavers are kept in memory together

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

bool leaves_before(const Leaver& a, const Leaver& b) {
  return a.rank != b.rank ? a.rank < b.rank : precedence(a.key) < precedence(b.key);
}

}  // namespace

void Eviction::remove_keys(std::vector<std::vector<Leaver>>& of_tables) {
  // All memory is taken before the first key leaves. By shard.
  std::vector<uint64_t> begin(kNumShards + 1), next(kNumShards);
  const auto shard_of = [this](const Leaver& leaver) { return Index::shard_of(rows_.index.hash(leaver.key, leaver.table)); };
  for (const std::vector<Leaver>& leavers : of_tables) {
    for (const Leaver& leaver : leavers) ++begin[shard_of(leaver) + 1];
  }
  for (uint32_t shard = 0; shard < kNumShards; ++shard) next[shard] = begin[shard + 1] += begin[shard];
  std::vector<std::pair<uint64_t, uint32_t>> keys(begin.back());
  std::vector<uint32_t>& freed = rows_.slots.freed(0);
  const size_t freed_before = freed.size();
  for (const std::vector<Leaver>& leavers : of_tables) {
    for (const Leaver& leaver : leavers) keys[--next[shard_of(leaver)]] = {leaver.key, leaver.table};
  }
  const std::function<void(int64_t, int)> remove_from_list = [&](int64_t number, int) {
    std::vector<Leaver>& leavers = of_tables[number];
    if (leavers.empty() || !lists_.is_kept(leavers.front().table)) return;
    // From the end, so that the keys which take the places of those removed stay.
    std::sort(leavers.begin(), leavers.end(), [](const Leaver& a, const Leaver& b) { return a.position > b.position; });
    for (const Leaver& leaver : leavers) lists_.remove(leaver.table, leaver.position);
  };
  const std::function<void(int64_t, int)> erase_from_shard = [&](int64_t shard, int) {
    constexpr uint64_t kAhead = 8;
    const IndexView index = rows_.index.view();
    for (uint64_t i = begin[shard]; i < begin[shard + 1]; ++i) {
      if (i + kAhead < begin[shard + 1]) {
        const uint64_t hash = index.hash(keys[i + kAhead].first, keys[i + kAhead].second);
        __builtin_prefetch(index.shard(hash) + index.home(hash), 1);
      }
      const auto [key, table] = keys[i];
      Entry* const entry = rows_.index.find(key, table, index.hash(key, table));
      freed[freed_before + i] = entry->slot();
      rows_.index.erase(entry);
    }
    // The last are taken first: rows that come together lie side by side.
    const auto first = freed.begin() + static_cast<int64_t>(freed_before);
    std::sort(first + static_cast<int64_t>(begin[shard]), first + static_cast<int64_t>(begin[shard + 1]), std::greater<>());
  };
  freed.resize(freed_before + begin.back(), kNoSlot);
  rows_.pool.run(static_cast<int64_t>(of_tables.size()), remove_from_list);
  rows_.pool.run(kNumShards, erase_from_shard);
  std::erase(freed, kNoSlot);
  bool has_rows = false;
  for (const std::vector<Leaver>& leavers : of_tables) {
    for (const Leaver& leaver : leavers) {
      if (leaver.slot == kNoSlot) {
        --rows_.tables.candidates[leaver.table];
        continue;
      }
      has_rows = true;
      --rows_.tables.rows[leaver.table];
      ++rows_.tables.numbers[leaver.table].evicted;
      rows_.tables.numbers[leaver.table].evicted_age += leaver.age;
    }
  }
  if (has_rows) {
    rows_.give_back();
  } else {
    rows_.order.keys_changed();
  }
}

void Eviction::mark_used(const uint32_t* slots, int64_t count, uint32_t table) const {
  const Rows rows = rows_.rows();
  const RetentionPolicy policy = rows_.tables.policies[table];
  const uint64_t now = static_cast<uint64_t>(clock_.now(table));
  for (int64_t i = 0; i < count; ++i) {
    uint32_t* const marks = rows.usage(slots[i]);
    if (policy.counts_uses) {
      const uint32_t uses = policy.aged_uses(marks[1], marks[0], now);
      marks[1] = uses + (uses != ~0u);
    }
    marks[0] = static_cast<uint32_t>(now);
  }
}

Leaver Eviction::leaver_of(uint32_t table, const Entry& entry, uint64_t position, int64_t now) const {
  const uint32_t slot = entry.slot();
  const uint64_t rank = RankOf{rows_.rows(), rows_.tables.policies[table], static_cast<uint64_t>(now)}(slot);
  const int64_t age = std::max<int64_t>(0, now - int64_t{rows_.rows().usage(slot)[0]});
  return {rank, entry.key, position, table, slot, static_cast<uint32_t>(age)};
}

std::vector<Eviction::Stretch> Eviction::stretches(const std::vector<Due>& dues) const {
  std::vector<Stretch> parts;
  for (size_t due = 0; due < dues.size(); ++due) {
    if (dues[due].found >= dues[due].count) continue;
    const uint64_t size = lists_.num_positions(dues[due].table);
    const uint64_t stretch = lists_.is_kept(dues[due].table) ? kStretch : rows_.index.capacity();
    for (uint64_t first = 0; first < size; first += stretch) {
      parts.push_back({due, dues[due].table, first, std::min(first + stretch, size)});
    }
  }
  return parts;
}

void Eviction::mark_in_use(const std::vector<Due>& dues, const std::vector<SlotSpan>& in_use, bool is_in_use) {
  in_use_bits_.resize((rows_.slots.end() + 63) / 64);
  for (const Due& due : dues) is_due_[due.table] = 1;
  for (const SlotSpan& span : in_use) {
    if (is_due_[span.table] == 0) continue;
    for (int64_t i = 0; i < span.count; ++i) {
      const uint32_t slot = span.slots[i];
      if (slot == kNoSlot) continue;
      const uint64_t bit = uint64_t{1} << (slot % 64);
      uint64_t& word = in_use_bits_[slot / 64];
      word = is_in_use ? word | bit : word & ~bit;
    }
  }
  for (const Due& due : dues) is_due_[due.table] = 0;
}

// A sample says about which row of a long table is the last to leave; so few rows need keeping to compare them.
void Eviction::guess_bound(Due& due) const {
  const uint64_t keys = lists_.num_keys(due.table);
  if (keys < kSampleSize) return;
  const uint64_t size = lists_.num_positions(due.table);
  // Odd: the index fills its groups of places from their first on, so that others would be all of one kind.
  const uint64_t stride = std::max<uint64_t>(1, size / std::min(kSampleSize, keys / 16)) | 1;
  std::vector<Leaver> sample;
  const int64_t now = clock_.now(due.table);
  lists_.each(due.table, 0, size, stride, [&](const Entry* entry, uint64_t position) {
    if (entry->slot() != kNoSlot) sample.push_back(leaver_of(due.table, *entry, position, now));
  });
  const uint64_t guess = sample.size() * due.count / std::max<uint64_t>(1, rows_.tables.num_rows(due.table)) * 5 / 4 + 64;
  if (guess >= sample.size()) return;
  const auto last = sample.begin() + static_cast<int64_t>(guess);
  std::nth_element(sample.begin(), last, sample.end(), leaves_before);
  due.is_bounded = true;
  due.bound = *last;
}

void Eviction::keep_lowest(std::vector<Leaver>& leavers, uint64_t count) {
  if (leavers.size() <= count) return;
  std::nth_element(leavers.begin(), leavers.begin() + static_cast<int64_t>(count), leavers.end(), leaves_before);
  leavers.resize(count);
}

// The rows of a part that may be among those that leave.
std::vector<Leaver> Eviction::lowest_of(const Stretch& part, const Due& due, int thread) {
  std::vector<Leaver>& leavers = leavers_[thread].of_thread;
  leavers.clear();
  const int64_t now = clock_.now(part.table);
  const uint64_t* const in_use_bits = in_use_bits_.data();
  const uint64_t highest = due.is_bounded ? due.bound.rank : ~uint64_t{0};
  const RankOf rank_of{rows_.rows(), rows_.tables.policies[part.table], static_cast<uint64_t>(now)};
  lists_.each(part.table, part.first, part.last, 1, [&](const Entry* entry, uint64_t position) {
    const uint32_t slot = entry->slot();
    if (slot == kNoSlot || rank_of(slot) > highest) return;
    if ((in_use_bits[slot / 64] >> (slot % 64) & 1) != 0) return;
    const Leaver row = leaver_of(part.table, *entry, position, now);
    if (due.is_bounded && !leaves_before(row, due.bound)) return;
    leavers.push_back(row);
  });
  keep_lowest(leavers, due.count);
  return leavers;
}

void Eviction::evict_lowest(std::vector<Due>& dues, const std::vector<SlotSpan>& in_use) {
  std::vector<uint32_t> tables;
  for (const Due& due : dues) tables.push_back(due.table);
  lists_.choose_ways(tables);
  const AtEnd unmark([&] { mark_in_use(dues, in_use, false); });
  mark_in_use(dues, in_use, true);
  rows_.pool.run(static_cast<int64_t>(dues.size()), [&](int64_t number, int) { guess_bound(dues[number]); });
  std::vector<std::vector<Leaver>> leaving(dues.size());
  for (std::vector<Stretch> parts = stretches(dues); !parts.empty();) {
    std::vector<std::vector<Leaver>> found(parts.size());
    rows_.pool.run(static_cast<int64_t>(parts.size()), [&](int64_t number, int thread) {
      found[number] = lowest_of(parts[number], dues[parts[number].due], thread);
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
  rows_.pool.run(static_cast<int64_t>(dues.size()), [&](int64_t number, int) { keep_lowest(leaving[number], dues[number].count); });
  remove_keys(leaving);
}

// Calls judge(part, entry, position, list) for all keys of some tables, which adds to the list what may leave; then, with no
// other reader about, settle(list), which keeps what does leave.
template <typename Judge, typename Settle>
void Eviction::sweep(const std::vector<uint32_t>& tables, const Judge& judge, const Settle& settle) {
  std::vector<Stretch> parts;
  uint64_t size = 0;
  const auto look_through = [&] {
    std::vector<std::vector<Leaver>> leaving(parts.size());
    rows_.pool.run(static_cast<int64_t>(parts.size()), [&](int64_t number, int) {
      const Stretch& part = parts[number];
      lists_.each(part.table, part.first, part.last, 1, [&](const Entry* entry, uint64_t position) {
        judge(part, *entry, position, &leaving[number]);
      });
    });
    rows_.pool.run(static_cast<int64_t>(parts.size()), [&](int64_t number, int) { settle(parts[number], &leaving[number]); });
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
  lists_.choose_ways(tables);
  for (size_t number = 0; number < tables.size(); ++number) {
    const bool is_listed = lists_.is_kept(tables[number]);
    // Of the index whole shards, within which entries move. Of a list from the end: what is removed is replaced by keys that
    // were looked at.
    const uint64_t stretch = is_listed ? kStretch : rows_.index.capacity();
    for (uint64_t last = lists_.num_positions(tables[number]); last > 0;) {
      const uint64_t first = (last - 1) / stretch * stretch;
      parts.push_back({number, tables[number], first, last});
      size += last - first;
      last = first;
      if (size >= kSweptAtOnce) look_through();
    }
  }
  if (!parts.empty()) look_through();
}

void Eviction::evict_expired(const std::vector<uint32_t>& tables) {
  const auto judge = [this](const Stretch& part, const Entry& entry, uint64_t position, std::vector<Leaver>* leavers) {
    if (entry.slot() == kNoSlot) return;
    const Leaver row = leaver_of(part.table, entry, position, clock_.now(part.table));
    if (row.age > rows_.tables.policies[part.table].ttl) leavers->push_back(row);
  };
  sweep(tables, judge, [](const Stretch&, std::vector<Leaver>*) {});
}

void Eviction::halve_counts(const Halvings& halvings) {
  rows_.order.keys_changed();
  std::vector<uint32_t> tables;
  for (const auto& [table, times] : halvings) tables.push_back(table);
  Entry* const entries = rows_.index.view().entries;
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

void Eviction::reset() noexcept {
  std::fill(is_due_.begin(), is_due_.end(), 0);
  std::fill(in_use_bits_.begin(), in_use_bits_.end(), 0);
}

}  // namespace penstock
