// The verbs of a store: each alone, and whole again whatever becomes of it.
#include "store/host_store.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <new>
#include <system_error>
#include <utility>

namespace penstock {
namespace {

std::atomic<uint64_t> stores_made{0};

}  // namespace

HostStore::HostStore(const RowLayout& layout, OptimizerKind optimizer, const std::vector<TableRules>& tables,
                     const StoreOptions& options)
    : number_(stores_made.fetch_add(1) + 1),
      rows_(layout, optimizer, tables, options),
      finder_(rows_),
      lists_(rows_, options.scan_from),
      clock_(rows_.tables),
      eviction_(rows_, lists_, clock_),
      admission_(rows_, lists_, clock_, eviction_),
      insertion_(rows_, finder_, admission_),
      lookups_(rows_, finder_, insertion_),
      updates_(rows_, finder_, insertion_, eviction_),
      access_(rows_, finder_, insertion_, lists_, clock_) {
  if (!rows_.open()) throw std::bad_alloc();
}

template <typename Body>
Status HostStore::call(const Body& body) {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  finder_.begin();
  Status status;
  try {
    status = body();
  } catch (const std::bad_alloc&) {
    status = Status::kNoWorkingMemory;
  } catch (const std::system_error&) {
    status = Status::kNoThreads;
  }
  if (status == Status::kNoWorkingMemory || status == Status::kNoThreads) recount();
  return status;
}

// After a call that was given up somewhere. An entry of the index, its slot and its place in a list are made and given up
// together, but not all that is counted of them, and what belongs to the call may be left. Slots that were not given back yet
// stay in the lists of freed ones, for the next call that does so.
void HostStore::recount() noexcept {
  rows_.slots.erased();
  rows_.order.keys_changed();
  rows_.tables.recount(rows_.entries(), rows_.num_places());
  admission_.reset();
  lists_.reset();
  eviction_.reset();
}

Status HostStore::pooled_lookup(std::shared_ptr<const SharedPlan> plan, const PackedKeys& batch, bool insert, float* out,
                                Lookup* lookup) {
  lookup->store = number_;
  lookup->plan = std::move(plan);
  return call([&] { return lookups_.look_up(lookup->plan->view(), batch, insert, out, lookup); });
}

Status HostStore::apply_gradients(std::vector<LookupGradient>& gradients, const Hyper* hypers, uint64_t step,
                                  bool is_order_free, const DefaultGradients* defaults, int64_t* rows) {
  *rows = 0;
  if (gradients.empty()) return Status::kOk;
  return call([&] { return updates_.apply(gradients, hypers, step, is_order_free, defaults, rows); });
}

Status HostStore::gradient_norm(std::vector<LookupGradient>& gradients, double order, bool is_order_free, double* total) {
  *total = 0;
  if (gradients.empty()) return Status::kOk;
  return call([&] { return updates_.measure(gradients, order, is_order_free, total); });
}

Status HostStore::read_looked_up(const Lookup& lookup, float* vectors) {
  return call([&] {
    lookups_.read(lookup, vectors);
    return Status::kOk;
  });
}

Status HostStore::find(uint32_t table, const int64_t* keys, int64_t count, bool insert, const FoundRows& out) {
  return call([&] { return access_.find(table, keys, count, insert, out); });
}

Status HostStore::insert_or_assign(uint32_t table, const int64_t* keys, int64_t count, const GivenRows& rows,
                                   int64_t* inserted) {
  return call([&] { return access_.assign(table, keys, count, rows, inserted); });
}

Status HostStore::erase(uint32_t table, const int64_t* keys, int64_t count, int64_t* erased) {
  return call([&] { return access_.erase(table, keys, count, erased); });
}

Status HostStore::export_batch(uint32_t table, uint64_t version, ExportedRows* out) {
  return call([&] {
    if (version != rows_.order.version()) return Status::kStaleCursor;
    access_.export_rows(table, out);
    return Status::kOk;
  });
}

Status HostStore::export_candidates(uint32_t table, uint64_t version, ExportedCounts* out) {
  return call([&] {
    if (version != rows_.order.version()) return Status::kStaleCursor;
    access_.export_counts(table, out);
    return Status::kOk;
  });
}

Status HostStore::import_candidates(uint32_t table, const int64_t* keys, const int64_t* counts, int64_t count) {
  if (rows_.tables.policies[table].min_count == 0) return Status::kOk;  // it does not count
  return call([&] { return admission_.count_keys(table, keys, counts, count); });
}

Status HostStore::advance(uint64_t step, uint64_t seconds) {
  if (!rows_.tables.retains) return Status::kOk;
  return call([&] {
    const Clock::Events events = clock_.advance(step, seconds);
    if (!events.expiring.empty()) eviction_.evict_expired(events.expiring);
    if (!events.halvings.empty()) eviction_.halve_counts(events.halvings);
    return Status::kOk;
  });
}

RetentionNumbers HostStore::retention(uint32_t table, float* value, float* state) const {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  const uint32_t slot = rows_.tables.default_slots[table];
  if (slot != kNoSlot) {
    const Rows rows = rows_.rows();
    widen_values(rows.type, rows.value(slot), rows.dim, value);
    std::copy_n(rows.state(slot), rows.state_dim, state);
  }
  return clock_.numbers(table);
}

void HostStore::counters(int64_t* rows, int64_t* candidates, RetentionNumbers* numbers) const {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  for (uint32_t table = 0; table < rows_.tables.size(); ++table) {
    rows[table] = static_cast<int64_t>(num_rows(table));
    candidates[table] = static_cast<int64_t>(rows_.tables.candidates[table]);
    numbers[table] = rows_.tables.retains ? clock_.numbers(table) : RetentionNumbers{};
  }
}

void HostStore::set_retention(uint32_t table, const RetentionNumbers& numbers, const float* value, const float* state) {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  clock_.set_numbers(table, numbers);
  const uint32_t slot = rows_.tables.default_slots[table];
  if (slot == kNoSlot) return;
  const Rows rows = rows_.rows();
  store_values(rows.type, value, rows.dim, rows.value(slot));
  std::copy_n(state, rows.state_dim, rows.state(slot));
}

uint64_t HostStore::num_candidates(uint32_t table) const {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  return rows_.tables.candidates[table];
}

uint64_t HostStore::content_version() const {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  return rows_.order.version();
}

uint64_t HostStore::longest_probe() const {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  return rows_.index.longest_probe();
}

bool HostStore::row_slots(uint32_t table, uint32_t* slots, size_t count) const {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  if (count != num_rows(table)) return false;
  const Entry* const entries = rows_.entries();
  for (uint64_t place = 0; place < rows_.num_places(); ++place) {
    if (entries[place].table() == table && entries[place].slot() != kNoSlot) *slots++ = entries[place].slot();
  }
  return true;
}

StoreMemory HostStore::memory() const {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  const uint64_t slots = rows_.slots.capacity();
  const uint64_t row_bytes = rows_.layout.value_bytes() + rows_.layout.state_bytes();
  StoreMemory memory{0, rows_.slots.num_free(), slots, rows_.index.memory_bytes() + lists_.memory_bytes(), slots * row_bytes};
  for (uint32_t table = 0; table < rows_.tables.size(); ++table) memory.rows += num_rows(table);
  return memory;
}

std::string HostStore::check_invariants() const {
  const std::lock_guard<ForkSafeMutex> guard(call_);
  if (!rows_.index.is_consistent()) return "an index entry cannot be reached from its home, or counts differ";
  std::vector<uint8_t> uses(rows_.slots.end());
  std::vector<uint64_t> rows_of_table(rows_.tables.size()), candidates_of_table(rows_.tables.size());
  const Entry* const entries = rows_.entries();
  for (uint64_t place = 0; place < rows_.num_places(); ++place) {
    const Entry& entry = entries[place];
    if (entry.is_empty()) continue;
    const uint32_t table = entry.table();
    if (table >= rows_.tables.size()) return "an index entry names an unknown table";
    if (entry.is_candidate()) {
      if (entry.count() == 0) return "a key is counted that never occurred";
      ++candidates_of_table[table];
      continue;
    }
    if (entry.slot() >= uses.size()) return "an index entry names a slot that was never handed out";
    ++uses[entry.slot()];
    ++rows_of_table[table];
  }
  for (const uint32_t slot : rows_.tables.default_slots) {
    if (slot != kNoSlot) ++uses[slot];
  }
  rows_.slots.count_free(&uses);
  if (std::any_of(uses.begin(), uses.end(), [](uint8_t n) { return n != 1; })) {
    return "a slot is used twice or lost: rows + free slots != slots handed out";
  }
  for (uint32_t table = 0; table < rows_.tables.size(); ++table) {
    const RetentionPolicy& policy = rows_.tables.policies[table];
    if (rows_of_table[table] != num_rows(table)) return "the row count of a table is wrong";
    if (candidates_of_table[table] != rows_.tables.candidates[table]) return "the number of counted keys is wrong";
    const std::string wrong = lists_.check(table, candidates_of_table[table] + (policy.evicts ? rows_of_table[table] : 0));
    if (!wrong.empty()) return wrong;
    if (rows_of_table[table] > policy.max_rows || candidates_of_table[table] > policy.max_candidates) {
      return "a table is beyond its budget";
    }
  }
  return "";
}

}  // namespace penstock
