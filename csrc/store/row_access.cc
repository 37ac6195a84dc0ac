// Rows named one by one: read, written, erased and copied out.
#include "store/row_access.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>

namespace penstock {

Status RowAccess::locate(uint32_t table, const int64_t* keys, int64_t count, Insert insert,
                         std::vector<uint32_t>* slots) {
  slots->resize(static_cast<size_t>(count));
  finder_.begin();
  rows_.pool.run((count + kChunkRows - 1) / kChunkRows, [&](int64_t chunk, int thread) {
    const int64_t first = chunk * kChunkRows;
    finder_.find(keys + first, std::min(kChunkRows, count - first), table, slots->data() + first, thread);
    finder_.flush(thread);
  });
  if (insert == Insert::kNever || !finder_.has_misses()) return Status::kOk;
  return insertion_.insert(insert == Insert::kAll, {{table, slots->data(), count}});
}

Status RowAccess::find(uint32_t table, const int64_t* keys, int64_t count, bool insert, const FoundRows& out) {
  const RowLayout& layout = rows_.layout;
  std::vector<uint32_t> slots;
  Status status = locate(table, keys, count, Insert::kNever, &slots);
  for (int64_t i = 0; i < count; ++i) out.found[i] = slots[i] != kNoSlot;
  if (insert) status = locate(table, keys, count, Insert::kAdmitted, &slots);
  if (status != Status::kOk) return status;
  for (int64_t i = 0; i < count; ++i) {
    if (slots[i] == kNoSlot) slots[i] = rows_.tables.default_slots[table];
  }
  rows_.copy(slots.data(), count, ValueType::kFloat32, out.values, out.state);
  std::vector<char> initial(layout.value_bytes());
  for (int64_t i = 0; i < count; ++i) {
    if (slots[i] != kNoSlot) continue;
    rows_.kernels.initialize(rows_.rows(), rows_.tables.initializers[table], static_cast<uint64_t>(keys[i]), initial.data(),
                             out.state + i * layout.state_dim);
    widen_values(layout.type, initial.data(), layout.dim, out.values + i * layout.dim);
  }
  return Status::kOk;
}

Status RowAccess::assign(uint32_t table, const int64_t* keys, int64_t count, const GivenRows& given, int64_t* inserted) {
  const RowLayout& layout = rows_.layout;
  const int64_t* const usage = given.usage;
  const uint64_t before = rows_.tables.num_rows(table);
  std::vector<uint32_t> slots;
  const int64_t evicted = rows_.tables.numbers[table].evicted;
  const Status status = locate(table, keys, count, Insert::kAll, &slots);
  *inserted = static_cast<int64_t>(rows_.tables.num_rows(table) - before) + rows_.tables.numbers[table].evicted - evicted;
  if (status != Status::kOk && status != Status::kOverBudget) return status;
  rows_.order.values_changed();  // though no row may have come or gone
  const int64_t now = clock_.now(table);
  if (usage != nullptr && layout.usage_dim != 0) {
    for (int64_t i = 0; i < count; ++i) rows_.tables.numbers[table].ahead += slots[i] != kNoSlot && usage[i * layout.usage_dim] > now;
  }
  // A thread owns the slots of its residue, so that of equal keys the last one stays.
  const uint32_t owners = static_cast<uint32_t>(rows_.pool.num_threads());
  rows_.pool.run(owners, [&](int64_t owner, int) {
    const Rows rows = rows_.rows();
    for (int64_t i = 0; i < count; ++i) {
      if (slots[i] % owners != static_cast<uint32_t>(owner) || slots[i] == kNoSlot) continue;
      if (given.type == layout.type) {
        std::memcpy(rows.value(slots[i]), static_cast<const char*>(given.values) + i * size_t{rows.value_bytes}, rows.value_bytes);
      } else {
        store_values(layout.type, static_cast<const float*>(given.values) + i * layout.dim, layout.dim, rows.value(slots[i]));
      }
      std::memcpy(rows.state(slots[i]), given.state + i * layout.state_dim, layout.state_dim * sizeof(float));
      uint32_t* const marks = rows.usage(slots[i]);
      for (uint32_t word = 0; word < layout.usage_dim; ++word) {
        const int64_t unused = word == 0 ? now : 0;
        const int64_t mark = usage != nullptr ? usage[i * layout.usage_dim + word] : unused;
        marks[word] = static_cast<uint32_t>(word == 0 ? std::min(mark, now) : mark);
      }
    }
  });
  return status;
}

Status RowAccess::erase(uint32_t table, const int64_t* keys, int64_t count, int64_t* erased) {
  // A thread owns the shards of its residue.
  const uint32_t owners = static_cast<uint32_t>(rows_.pool.num_threads());
  std::vector<Status> status(owners);
  std::vector<int64_t> number(owners);
  const auto erase_owned = [&](int64_t owner) {
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t key = static_cast<uint64_t>(keys[i]), hash = rows_.index.hash(key, table);
      const uint32_t shard = Index::shard_of(hash);
      if (shard % owners != static_cast<uint32_t>(owner)) continue;
      Entry* const entry = rows_.index.find(key, table, hash);
      if (entry == nullptr || entry->is_candidate()) continue;
      rows_.slots.freed(static_cast<int>(owner)).push_back(entry->slot());
      rows_.index.erase(entry);
      ++number[owner];
    }
  };
  rows_.pool.run(owners, [&](int64_t owner, int) {
    try {
      erase_owned(owner);
    } catch (const std::bad_alloc&) {
      status[owner] = Status::kNoWorkingMemory;
    }
  });
  // Of all that were erased, if not all there are: what is noted below must fit the index.
  *erased = std::accumulate(number.begin(), number.end(), int64_t{0});
  rows_.tables.rows[table] -= static_cast<uint64_t>(*erased);
  if (lists_.has_keys(table) && lists_.is_kept(table) && *erased != 0) {
    // A table that does not evict has noted them when they got their rows, which are not listed; now they may be counted again.
    lists_.note_dead(table, rows_.tables.policies[table].evicts ? static_cast<uint64_t>(*erased) : 0, true);
    lists_.tidy_if_worthwhile(table);
  }
  rows_.give_back();
  const auto short_one = std::find(status.begin(), status.end(), Status::kNoWorkingMemory);
  return short_one == status.end() ? Status::kOk : *short_one;
}

void RowAccess::export_rows(uint32_t table, ExportedRows* out) {
  const Entry* const entries = rows_.entries();
  const uint64_t end = rows_.num_places(), num_rows = rows_.tables.num_rows(table);
  const uint64_t most = std::min(static_cast<uint64_t>(out->most), num_rows);
  std::vector<uint32_t> slots;
  slots.reserve(most);
  const auto copy_key = [&](const Entry& entry) {
    out->keys[slots.size()] = static_cast<int64_t>(entry.key);
    slots.push_back(entry.slot());
  };
  if (ExportOrder::is_short(num_rows, end)) {
    constexpr uint64_t kAhead = 16;
    const auto [first, last] = rows_.order.of(table, rows_.tables, entries, end);
    const uint64_t* place = std::lower_bound(first, last, out->cursor);
    for (; place != last && slots.size() < most; ++place) {
      if (kAhead < static_cast<uint64_t>(last - place)) __builtin_prefetch(entries + place[kAhead]);
      copy_key(entries[*place]);
    }
    out->cursor = place == last ? end : *place;
  }
  for (; out->cursor < end && slots.size() < most; ++out->cursor) {
    const Entry& entry = entries[out->cursor];
    if (entry.table() == table && entry.slot() != kNoSlot) copy_key(entry);
  }
  if (out->cursor >= end) out->cursor = kExported;
  out->number = static_cast<int64_t>(slots.size());
  rows_.copy(slots.data(), out->number, rows_.layout.type, out->values, out->state);
  const Rows rows = rows_.rows();
  for (int64_t i = 0; i < out->number; ++i) {
    for (uint32_t word = 0; word < rows.usage_dim; ++word) out->usage[i * rows.usage_dim + word] = rows.usage(slots[i])[word];
  }
}

void RowAccess::export_counts(uint32_t table, ExportedCounts* out) {
  if (!lists_.has_keys(table)) return;
  lists_.tidy(table);
  const uint64_t size = lists_.num_positions(table);
  while (out->cursor < size && out->number < out->most) {
    // No more than there is room for.
    const uint64_t last = std::min(size, out->cursor + static_cast<uint64_t>(out->most - out->number));
    lists_.each(table, out->cursor, last, 1, [&](const Entry* entry, uint64_t) {
      if (!entry->is_candidate()) return;
      out->keys[out->number] = static_cast<int64_t>(entry->key);
      out->counts[out->number++] = entry->count();
    });
    out->cursor = last;
  }
}

}  // namespace penstock
