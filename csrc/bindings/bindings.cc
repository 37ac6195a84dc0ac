// The module, and the stores in Python. The interpreter lock is released while the core works.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "system/buffer_pool.h"
#include "store/host_store.h"
#include "system/memory.h"

using namespace penstock;
using namespace nb::literals;

namespace {

// Row values in the type that a store keeps them in: float32, or the bits of a narrow type.
using InValues = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutValues = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr size_t kMaxIdleBytes = size_t{1} << 30;

std::shared_ptr<const SharedPlan> make_plan(std::vector<int64_t> packed_feature, std::vector<uint32_t> table,
                                            const std::vector<uint8_t>& pooling_codes, std::vector<int64_t> max_keys,
                                            std::vector<int64_t> column, int64_t stride) {
  std::vector<Pooling> pooling;
  for (const uint8_t code : pooling_codes) pooling.push_back(static_cast<Pooling>(code));
  return std::make_shared<const SharedPlan>(std::move(packed_feature), std::move(table), std::move(pooling),
                                            std::move(max_keys), std::move(column), stride);
}

void check_table(const HostStore& store, uint32_t table) { check(table < store.layout().num_tables, "table: not of this store"); }

// Features: of the packed batch, served or not.
PackedKeys packed(const In<int64_t>& keys, const In<int64_t>& offsets, const std::optional<In<float>>& weights,
                  int64_t batch_size) {
  check(offsets.size() > 0 && batch_size >= 0, "offsets: expected features * batch_size + 1");
  const int64_t bags = static_cast<int64_t>(offsets.size()) - 1;
  check(batch_size == 0 ? bags == 0 : bags % batch_size == 0, "offsets: expected features * batch_size + 1");
  check(!weights || weights->size() == keys.size(), "weights: expected one a key");
  // An empty array may have no address, which would read as no weights.
  static const float kNoWeight = 1;
  return {keys.data(),
          offsets.data(),
          batch_size,
          batch_size == 0 ? 0 : bags / batch_size,
          static_cast<int64_t>(keys.size()),
          !weights ? nullptr : weights->size() ? weights->data() : &kNoWeight};
}

template <typename Values>
void check_bytes(const Values& values, ValueType type) {
  if (values.itemsize() != bytes_of(type)) throw std::invalid_argument("values: not of the store's type");
}

const Hyper* hypers_of(const InRows& hypers) { return reinterpret_cast<const Hyper*>(hypers.data()); }
constexpr size_t kHyperFields = 11;
static_assert(sizeof(Hyper) == kHyperFields * sizeof(float));

constexpr size_t kRetentionNumbers = sizeof(RetentionNumbers) / sizeof(int64_t);
static_assert(sizeof(RetentionNumbers) % sizeof(int64_t) == 0);

void check_retention(const HostStore& store, uint32_t table, size_t values, size_t states, size_t numbers) {
  check_table(store, table);
  check(values == store.layout().dim, "value: expected [dim]");
  check(states == store.layout().state_dim, "state: expected [state_dim]");
  check(numbers == kRetentionNumbers, "numbers: expected one of each");
}

// With no samples a plan may name features that a batch of no features has not.
Status py_pooled_lookup(HostStore& self, std::shared_ptr<const SharedPlan> plan, In<int64_t> keys, In<int64_t> offsets,
                        std::optional<In<float>> weights, int64_t batch_size, bool insert, OutRows out, Lookup& lookup) {
  const PackedKeys batch = packed(keys, offsets, weights, batch_size);
  check(plan != nullptr, "plan: none");
  const int64_t features = batch_size == 0 ? std::numeric_limits<int64_t>::max() : batch.num_features;
  check(plan->fits(features, self.layout().num_tables, self.layout().dim), "plan: not of this batch and store");
  check_rows(out, static_cast<size_t>(batch_size), static_cast<size_t>(plan->view().stride), "out: expected [B, stride]");
  check(lookup.store == 0, "lookup: used before");
  const nb::gil_scoped_release release;
  return self.pooled_lookup(std::move(plan), batch, insert, out.data(), &lookup);
}

Status py_look_up_keys(HostStore& self, In<int64_t> keys, In<int64_t> offsets, bool insert, OutRows out, Lookup& lookup) {
  const int64_t count = static_cast<int64_t>(keys.size());
  check(offsets.size() == self.layout().num_tables + 1, "offsets: expected tables + 1");
  std::shared_ptr<const SharedPlan> plan = SharedPlan::by_key(offsets.data(), self.layout().num_tables, count, self.layout().dim);
  check_rows(out, keys.size(), self.layout().dim, "out: expected [keys, dim]");
  check(lookup.store == 0, "lookup: used before");
  const nb::gil_scoped_release release;
  if (plan == nullptr) return Status::kBadOffsets;
  return self.pooled_lookup(std::move(plan), {keys.data(), nullptr, 1, count, count, nullptr, true}, insert, out.data(), &lookup);
}

using Gradients = std::vector<std::tuple<std::shared_ptr<Lookup>, InRows>>;

// The gradients of look-ups of a store that read as one plan does, none of them applied yet.
std::vector<LookupGradient> checked_gradients(const HostStore& self, const std::shared_ptr<const SharedPlan>& plan,
                                              const Gradients& gradients) {
  check(plan != nullptr, "plan: none");
  std::vector<LookupGradient> parts;
  uint64_t keys = 0;
  for (const auto& [lookup, grad] : gradients) {
    check(lookup != nullptr && self.made(*lookup), "lookup: of another store");
    check(!lookup->is_applied, "lookup: applied already");
    check(lookup->plan == plan || lookup->plan->reads_as(*plan), "lookup: of another plan");
    check_rows(grad, static_cast<size_t>(lookup->num_outputs()), static_cast<size_t>(lookup->plan->view().stride),
               "grad: expected [B, stride]");
    for (const LookupGradient& part : parts) check(part.lookup != lookup.get(), "lookup: given twice");
    parts.push_back({lookup.get(), lookup->batch(), grad.data()});
    keys += static_cast<uint64_t>(lookup->num_keys);
  }
  check(keys <= kMostUpdateKeys, "an update of more than 2^31 - 1 keys");
  return parts;
}

std::tuple<Status, double> py_gradient_norm(HostStore& self, std::shared_ptr<const SharedPlan> plan,
                                            const Gradients& gradients, double order, bool is_order_free) {
  check(order > 0, "order: above 0");
  std::vector<LookupGradient> parts = checked_gradients(self, plan, gradients);
  double total = 0;
  Status status;
  {
    const nb::gil_scoped_release release;
    status = self.gradient_norm(parts, order, is_order_free, &total);
  }
  return {status, total};
}

std::tuple<Status, int64_t> py_apply_gradients(HostStore& self, std::shared_ptr<const SharedPlan> plan,
                                               const Gradients& gradients, InRows hypers, uint64_t step,
                                               bool is_order_free, std::optional<InRows> default_sums,
                                               std::optional<In<bool>> touched) {
  const StoreLayout layout = self.layout();
  check_rows(hypers, layout.num_tables, kHyperFields, "hypers: expected [tables, 11]");
  check(default_sums.has_value() == touched.has_value(), "default_sums, touched: both or none");
  DefaultGradients defaults{nullptr, nullptr};
  if (touched) {
    check_rows(*default_sums, layout.num_tables, layout.dim, "default_sums: expected [tables, dim]");
    check(touched->size() == layout.num_tables, "touched: expected [tables]");
    defaults = {default_sums->data(), touched->data()};
  }
  std::vector<LookupGradient> parts = checked_gradients(self, plan, gradients);
  int64_t rows = 0;
  Status status;
  {
    const nb::gil_scoped_release release;
    status = self.apply_gradients(parts, hypers_of(hypers), step, is_order_free, touched ? &defaults : nullptr, &rows);
  }
  return {status, rows};
}

void bind_host_store(nb::module_& m) {
  nb::enum_<Status>(m, "Status")
      .value("OK", Status::kOk)
      .value("OUT_OF_MEMORY", Status::kOutOfMemory)
      .value("NO_WORKING_MEMORY", Status::kNoWorkingMemory)
      .value("NO_THREADS", Status::kNoThreads)
      .value("HALF_UPDATED", Status::kHalfUpdated)
      .value("TOO_MANY_ROWS", Status::kTooManyRows)
      .value("STALE_CURSOR", Status::kStaleCursor)
      .value("BAD_OFFSETS", Status::kBadOffsets)
      .value("BAD_WEIGHTS", Status::kBadWeights)
      .value("BAG_TOO_LONG", Status::kBagTooLong)
      .value("OVER_BUDGET", Status::kOverBudget);

  nb::class_<RetentionPolicy>(m, "RetentionPolicy")
      .def(
          "__init__",
          [](RetentionPolicy* self, bool retains, bool refuses, float default_value, uint64_t admission_seed,
             uint64_t admit_below, uint32_t min_count, uint64_t count_half_life, uint64_t max_rows, uint64_t max_candidates,
             bool evicts, bool by_uses, bool counts_uses, bool in_seconds, uint64_t ttl, uint64_t half_life) {
            new (self) RetentionPolicy{retains, refuses, default_value, admission_seed, admit_below, min_count, count_half_life,
                                       max_rows, max_candidates, evicts, by_uses, counts_uses,
                                       in_seconds, ttl, half_life};
          },
          nb::kw_only(), "retains"_a, "refuses"_a, "default_value"_a, "admission_seed"_a, "admit_below"_a, "min_count"_a,
          "count_half_life"_a, "max_rows"_a, "max_candidates"_a, "evicts"_a, "by_uses"_a, "counts_uses"_a, "in_seconds"_a, "ttl"_a,
          "half_life"_a);

  nb::class_<BufferPool>(m, "BufferPool")
      .def("__init__", [](BufferPool*) { throw nb::type_error("use buffer_pool()"); })
      .def("take_rows", [](BufferPool& pool, int64_t rows, int64_t columns) -> nb::object {
        constexpr int64_t kMostBytes = std::numeric_limits<int64_t>::max() / int64_t{sizeof(float)};
        check(rows >= 0 && columns >= 0 && (columns == 0 || rows <= kMostBytes / columns), "rows, columns: out of range");
        std::unique_ptr<BufferPool::Loan> loan = pool.take(static_cast<size_t>(rows * columns) * sizeof(float));
        if (!loan) return nb::none();
        float* const data = reinterpret_cast<float*>(loan->region.data());
        nb::capsule owner(loan.release(), [](void* p) noexcept { delete static_cast<BufferPool::Loan*>(p); });
        const size_t shape[2] = {static_cast<size_t>(rows), static_cast<size_t>(columns)};
        return nb::cast(nb::ndarray<nb::numpy, float>(data, 2, shape, owner));
      });
  m.def("keep_freed_memory", &keep_freed_memory);
  m.def("buffer_pool", [] { return std::make_shared<BufferPool>(kMaxIdleBytes); });

  nb::class_<SharedPlan>(m, "PoolingPlan")
      .def(nb::new_(&make_plan), "packed_feature"_a, "table"_a, "pooling"_a, "max_keys"_a, "column"_a, "stride"_a)
      .def_static(
          "by_key",
          [](uint32_t tables, uint32_t dim) {
            return SharedPlan::by_key(std::vector<int64_t>(size_t{tables} + 1).data(), tables, 0, dim);
          },
          "tables"_a, "dim"_a);

  nb::class_<Lookup>(m, "Lookup").def(nb::init<>()).def_ro("num_missing", &Lookup::num_missing).def_ro("is_applied", &Lookup::is_applied)
      .def(
          "reads_default",
          [](const Lookup& self, Out<bool> reads) {
            check(self.plan != nullptr && self.plan->is_by_key(), "lookup: not by key");
            check(reads.size() == static_cast<size_t>(self.num_keys), "reads: expected [keys]");
            std::transform(self.slots, self.slots + self.num_keys, reads.data(),
                           [&self](uint32_t slot) { return slot < self.num_defaults; });
          },
          "reads"_a.noconvert());

  nb::class_<HostStore>(m, "HostStore")
      .def(
          "__init__",
          [](HostStore* self, uint32_t dim, int value_type, uint32_t state_dim, uint32_t usage_dim, int optimizer,
             const std::vector<std::tuple<int, float, float, uint64_t, RetentionPolicy>>& tables, int num_threads,
             uint64_t max_bytes, const std::string& most_isa, uint64_t scan_from) {
            check(dim >= 1 && dim <= kMostDim, "dim: out of range");
            check(value_type >= 0 && value_type <= static_cast<int>(ValueType::kFloat16), "value_type: unknown");
            check(optimizer >= 0 && optimizer <= static_cast<int>(OptimizerKind::kAdamW), "optimizer: unknown");
            check(state_dim == state_dim_of(static_cast<OptimizerKind>(optimizer), dim), "state_dim: not of the optimizer");
            check(usage_dim <= 2, "usage_dim: 0, 1 or 2");
            check(!tables.empty() && tables.size() <= kMaxTables, "tables: 1 to 65535");
            check(num_threads >= 1, "num_threads: at least 1");
            std::vector<TableRules> rules;
            for (const auto& [kind, scale, state, seed, retention] : tables) {
              check(usage_dim == 2 || !(retention.by_uses || retention.counts_uses), "usage_dim: 2 where rows leave by their uses");
              check(usage_dim >= 1 || !retention.evicts, "usage_dim: at least 1 where rows leave");
              rules.push_back({{static_cast<InitializerKind>(kind), scale, state, seed}, retention});
            }
            const RowLayout layout{dim, static_cast<ValueType>(value_type), state_dim, usage_dim};
            new (self) HostStore(layout, static_cast<OptimizerKind>(optimizer), rules,
                                 {num_threads, max_bytes, most_isa, scan_from});
          },
          nb::kw_only(), "dim"_a, "value_type"_a, "state_dim"_a, "usage_dim"_a, "optimizer"_a, "tables"_a, "num_threads"_a, "max_bytes"_a,
          "most_isa"_a, "scan_from"_a)
      .def("pooled_lookup", &py_pooled_lookup, "plan"_a, "keys"_a.noconvert(), "offsets"_a.noconvert(),
           "weights"_a.noconvert().none(), "batch_size"_a, "insert"_a, "out"_a.noconvert(), "lookup"_a)
      .def("look_up_keys", &py_look_up_keys, "keys"_a.noconvert(), "offsets"_a.noconvert(), "insert"_a, "out"_a.noconvert(),
           "lookup"_a)
      .def(
          "read_looked_up",
          [](HostStore& self, const Lookup& lookup, OutRows vectors) {
            check(self.made(lookup), "lookup: of another store");
            check_rows(vectors, static_cast<size_t>(lookup.num_keys), self.layout().dim, "vectors: expected [keys, dim]");
            const nb::gil_scoped_release release;
            return self.read_looked_up(lookup, vectors.data());
          },
          "lookup"_a, "vectors"_a.noconvert())
      .def("gradient_norm", &py_gradient_norm, "plan"_a, "gradients"_a.noconvert(), "order"_a, "is_order_free"_a)
      .def("apply_gradients", &py_apply_gradients, "plan"_a, "gradients"_a.noconvert(), "hypers"_a.noconvert(), "step"_a,
           "is_order_free"_a, "default_sums"_a.noconvert().none(), "touched"_a.noconvert().none())
      .def(
          "find",
          [](HostStore& self, uint32_t table, In<int64_t> keys, bool insert, OutRows values, OutRows state,
             Out<bool> found) {
            check_table(self, table);
            check_rows(values, keys.size(), self.layout().dim, "values: expected [n, dim]");
            check_rows(state, keys.size(), self.layout().state_dim, "state: expected [n, state_dim]");
            check(found.size() == keys.size(), "found: expected [n]");
            const nb::gil_scoped_release release;
            return self.find(table, keys.data(), static_cast<int64_t>(keys.size()), insert,
                             {values.data(), state.data(), found.data()});
          },
          "table"_a, "keys"_a.noconvert(), "insert"_a, "values"_a.noconvert(), "state"_a.noconvert(), "found"_a.noconvert())
      .def(
          "insert_or_assign",
          [](HostStore& self, uint32_t table, In<int64_t> keys, InValues values, InRows state,
             std::optional<In<int64_t>> usage) {
            const ValueType type = values.itemsize() == bytes_of(ValueType::kFloat32) ? ValueType::kFloat32 : self.layout().type;
            check_bytes(values, type);
            check_table(self, table);
            check_rows(values, keys.size(), self.layout().dim, "values: expected [n, dim]");
            check_rows(state, keys.size(), self.layout().state_dim, "state: expected [n, state_dim]");
            check(!usage || usage->size() == keys.size() * self.layout().usage_dim, "usage: expected [n * usage_dim]");
            int64_t inserted = 0;
            Status status;
            {
              const nb::gil_scoped_release release;
              status = self.insert_or_assign(table, keys.data(), static_cast<int64_t>(keys.size()),
                                             {type, values.data(), state.data(), usage ? usage->data() : nullptr}, &inserted);
            }
            return std::make_tuple(status, inserted);
          },
          "table"_a, "keys"_a.noconvert(), "values"_a.noconvert(), "state"_a.noconvert(), "usage"_a.noconvert().none())
      .def(
          "erase",
          [](HostStore& self, uint32_t table, In<int64_t> keys) {
            check_table(self, table);
            int64_t erased = 0;
            Status status;
            {
              const nb::gil_scoped_release release;
              status = self.erase(table, keys.data(), static_cast<int64_t>(keys.size()), &erased);
            }
            return std::make_tuple(status, erased);
          },
          "table"_a, "keys"_a.noconvert())
      .def(
          "export_batch",
          [](HostStore& self, uint32_t table, uint64_t cursor, uint64_t version, Out<int64_t> keys, OutValues values,
             OutRows state, Out<int64_t> usage) {
            check_bytes(values, self.layout().type);
            check_table(self, table);
            check_rows(values, keys.size(), self.layout().dim, "values: expected [n, dim]");
            check_rows(state, keys.size(), self.layout().state_dim, "state: expected [n, state_dim]");
            check(usage.size() == keys.size() * self.layout().usage_dim, "usage: expected [n * usage_dim]");
            ExportedRows out{cursor, static_cast<int64_t>(keys.size()), keys.data(), values.data(), state.data(), usage.data()};
            Status status;
            {
              const nb::gil_scoped_release release;
              status = self.export_batch(table, version, &out);
            }
            return std::make_tuple(status, out.number, out.cursor);
          },
          "table"_a, "cursor"_a, "version"_a, "keys"_a.noconvert(), "values"_a.noconvert(), "state"_a.noconvert(),
          "usage"_a.noconvert())
      .def("advance", &HostStore::advance, nb::call_guard<nb::gil_scoped_release>())
      .def("num_candidates",
           [](const HostStore& self, uint32_t table) {
             check_table(self, table);
             const nb::gil_scoped_release release;
             return self.num_candidates(table);
           })
      .def(
          "export_candidates",
          [](HostStore& self, uint32_t table, uint64_t cursor, uint64_t version, Out<int64_t> keys, Out<int64_t> counts) {
            check_table(self, table);
            check(counts.size() == keys.size(), "counts: expected [n]");
            ExportedCounts out{cursor, static_cast<int64_t>(keys.size()), keys.data(), counts.data()};
            Status status;
            {
              const nb::gil_scoped_release release;
              status = self.export_candidates(table, version, &out);
            }
            return std::make_tuple(status, out.number, out.cursor);
          },
          "table"_a, "cursor"_a, "version"_a, "keys"_a.noconvert(), "counts"_a.noconvert())
      .def(
          "import_candidates",
          [](HostStore& self, uint32_t table, In<int64_t> keys, In<int64_t> counts) {
            check_table(self, table);
            check(counts.size() == keys.size(), "counts: expected [n]");
            const nb::gil_scoped_release release;
            return self.import_candidates(table, keys.data(), counts.data(), static_cast<int64_t>(keys.size()));
          },
          "table"_a, "keys"_a.noconvert(), "counts"_a.noconvert())
      .def(
          "retention",
          [](const HostStore& self, uint32_t table, Out<float> value, Out<float> state, Out<int64_t> numbers) {
            check_retention(self, table, value.size(), state.size(), numbers.size());
            const nb::gil_scoped_release release;
            const RetentionNumbers now = self.retention(table, value.data(), state.data());
            std::memcpy(numbers.data(), &now, sizeof(now));
          },
          "table"_a, "value"_a.noconvert(), "state"_a.noconvert(), "numbers"_a.noconvert())
      .def(
          "counters",
          [](const HostStore& self, Out<int64_t> rows, Out<int64_t> candidates, Out<int64_t> numbers) {
            const size_t tables = self.layout().num_tables;
            check(rows.size() == tables && candidates.size() == tables, "rows, candidates: expected [tables]");
            check(numbers.size() == tables * kRetentionNumbers, "numbers: expected one of each, by table");
            const nb::gil_scoped_release release;
            self.counters(rows.data(), candidates.data(), reinterpret_cast<RetentionNumbers*>(numbers.data()));
          },
          "rows"_a.noconvert(), "candidates"_a.noconvert(), "numbers"_a.noconvert())
      .def(
          "set_retention",
          [](HostStore& self, uint32_t table, In<float> value, In<float> state, In<int64_t> numbers) {
            check_retention(self, table, value.size(), state.size(), numbers.size());
            RetentionNumbers given;
            std::memcpy(static_cast<void*>(&given), numbers.data(), sizeof(given));
            const nb::gil_scoped_release release;
            self.set_retention(table, given, value.data(), state.data());
          },
          "table"_a, "value"_a.noconvert(), "state"_a.noconvert(), "numbers"_a.noconvert())
      .def("num_rows",
           [](const HostStore& self, uint32_t table) {
             check_table(self, table);
             const nb::gil_scoped_release release;
             return self.num_rows(table);
           })
      .def("longest_probe", &HostStore::longest_probe, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "row_slots",
          [](const HostStore& self, uint32_t table, Out<uint32_t> slots) {
            check_table(self, table);
            bool is_written;
            {
              const nb::gil_scoped_release release;
              is_written = self.row_slots(table, slots.data(), slots.size());
            }
            check(is_written, "slots: expected [num_rows(table)]");
          },
          "table"_a, "slots"_a.noconvert())
      .def("check_invariants", &HostStore::check_invariants, nb::call_guard<nb::gil_scoped_release>())
      .def("memory",
           [](const HostStore& self) {
             StoreMemory m;
             {
               const nb::gil_scoped_release release;
               m = self.memory();
             }
             return std::make_tuple(m.rows, m.free_slots, m.slot_capacity, m.index_bytes, m.row_bytes);
           })
      .def_prop_ro("content_version",
                   [](const HostStore& self) {
                     const nb::gil_scoped_release release;
                     return self.content_version();
                   })
      .def_prop_ro("isa", [](const HostStore& self) { return std::string(self.layout().isa); });
}

}  // namespace

NB_MODULE(_core, m) {
  // Plans in caches live until the interpreter ends, and then are not taken down one by one.
  nb::set_leak_warnings(false);
  m.attr("version") = kVersion;
  m.attr("built_from") = kBuiltFrom;
  bind_columns(m);
  bind_host_store(m);
  bind_launcher(m);
  bind_bag_sums(m);
}
