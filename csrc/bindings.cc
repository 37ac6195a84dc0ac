// The module, and the stores in Python. The interpreter lock is released while the core works.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "buffer_pool.h"
#include "host_store.h"
#include "memory.h"

using namespace penstock;
using namespace nb::literals;

namespace {

// Row values in the type that a store keeps them in: float32, or the bits of a narrow type.
using InValues = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutValues = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr size_t kMaxIdleBytes = size_t{1} << 30;

// Owns copies of the arrays that a PoolingPlan points to.
struct PlanArrays {
  std::vector<int64_t> packed_feature;
  std::vector<uint32_t> table;
  std::vector<Pooling> pooling;
  std::vector<int64_t> max_keys;
  std::vector<int64_t> column;
  int64_t stride;
  std::vector<int64_t> by_table;

  PlanArrays(std::vector<int64_t> packed_feature, std::vector<uint32_t> table, const std::vector<uint8_t>& pooling_codes,
             std::vector<int64_t> max_keys, std::vector<int64_t> column, int64_t stride)
      : packed_feature(std::move(packed_feature)),
        table(std::move(table)),
        max_keys(std::move(max_keys)),
        column(std::move(column)),
        stride(stride),
        by_table(this->table.size()) {
    for (const uint8_t code : pooling_codes) pooling.push_back(static_cast<Pooling>(code));
    std::iota(by_table.begin(), by_table.end(), 0);
    std::stable_sort(by_table.begin(), by_table.end(),
                     [this](int64_t a, int64_t b) { return this->table[a] < this->table[b]; });
  }

  PoolingPlan plan() const {
    return {static_cast<int64_t>(table.size()), packed_feature.data(), table.data(), pooling.data(), max_keys.data(),
            column.data(), stride, by_table.data()};
  }
};

PackedKeys packed(const In<int64_t>& keys, const In<int64_t>& offsets, const std::optional<In<float>>& weights,
                  int64_t batch_size) {
  const int64_t bags = static_cast<int64_t>(offsets.shape(0)) - 1;
  return {keys.data(),
          offsets.data(),
          batch_size,
          batch_size == 0 ? 0 : bags / batch_size,
          static_cast<int64_t>(keys.size()),
          weights ? weights->data() : nullptr};
}

template <typename Values>
void check_bytes(const Values& values, ValueType type) {
  if (values.itemsize() != bytes_of(type)) throw std::invalid_argument("values: not of the store's type");
}

const Hyper* hypers_of(const InRows& hypers) { return reinterpret_cast<const Hyper*>(hypers.data()); }
static_assert(sizeof(Hyper) == 10 * sizeof(float));

void bind_host_store(nb::module_& m) {
  nb::enum_<Status>(m, "Status")
      .value("OK", Status::kOk)
      .value("OUT_OF_MEMORY", Status::kOutOfMemory)
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
             bool evicts, bool by_uses, bool in_seconds, uint64_t ttl, uint64_t half_life) {
            new (self) RetentionPolicy{retains, refuses, default_value, admission_seed, admit_below, min_count, count_half_life,
                                       max_rows, max_candidates, evicts, by_uses, in_seconds, ttl, half_life};
          },
          nb::kw_only(), "retains"_a, "refuses"_a, "default_value"_a, "admission_seed"_a, "admit_below"_a, "min_count"_a,
          "count_half_life"_a, "max_rows"_a, "max_candidates"_a, "evicts"_a, "by_uses"_a, "in_seconds"_a, "ttl"_a,
          "half_life"_a);

  nb::class_<BufferPool>(m, "BufferPool")
      .def("__init__", [](BufferPool*) { throw nb::type_error("use buffer_pool()"); })
      .def("take_rows", [](BufferPool& pool, int64_t rows, int64_t columns) -> nb::object {
        std::unique_ptr<BufferPool::Loan> loan = pool.take(static_cast<size_t>(rows * columns) * sizeof(float));
        if (!loan) return nb::none();
        float* const data = reinterpret_cast<float*>(loan->region.data());
        nb::capsule owner(loan.release(), [](void* p) noexcept { delete static_cast<BufferPool::Loan*>(p); });
        const size_t shape[2] = {static_cast<size_t>(rows), static_cast<size_t>(columns)};
        return nb::cast(nb::ndarray<nb::numpy, float>(data, 2, shape, owner));
      });
  m.def("keep_freed_memory", &keep_freed_memory);
  m.def("buffer_pool", [] { return std::make_shared<BufferPool>(kMaxIdleBytes); });

  nb::class_<PlanArrays>(m, "PoolingPlan")
      .def(nb::init<std::vector<int64_t>, std::vector<uint32_t>, std::vector<uint8_t>, std::vector<int64_t>,
                    std::vector<int64_t>, int64_t>(),
           nb::arg("packed_feature"), nb::arg("table"), nb::arg("pooling"), nb::arg("max_keys"), nb::arg("column"),
           nb::arg("stride"));

  nb::class_<Lookup>(m, "Lookup").def(nb::init<>()).def_ro("num_missing", &Lookup::num_missing);

  nb::class_<HostStore>(m, "HostStore")
      .def(
          "__init__",
          [](HostStore* self, uint32_t dim, int value_type, uint32_t state_dim, uint32_t usage_dim, int optimizer,
             const std::vector<std::tuple<int, float, float, uint64_t, RetentionPolicy>>& tables, int num_threads,
             uint64_t max_bytes, const std::string& most_isa) {
            std::vector<TableRules> rules;
            for (const auto& [kind, scale, state, seed, retention] : tables) {
              rules.push_back({{static_cast<InitializerKind>(kind), scale, state, seed}, retention});
            }
            new (self) HostStore(dim, static_cast<ValueType>(value_type), state_dim, usage_dim,
                                 static_cast<OptimizerKind>(optimizer), rules, num_threads, max_bytes, most_isa);
          },
          nb::kw_only(), "dim"_a, "value_type"_a, "state_dim"_a, "usage_dim"_a, "optimizer"_a, "tables"_a, "num_threads"_a, "max_bytes"_a,
          "most_isa"_a)
      .def("open", &HostStore::open)
      .def(
          "pooled_lookup",
          [](HostStore& self, const PlanArrays& plan, In<int64_t> keys, In<int64_t> offsets,
             std::optional<In<float>> weights, int64_t batch_size, bool insert, OutRows out, Lookup& lookup) {
            const nb::gil_scoped_release release;
            return self.pooled_lookup(plan.plan(), packed(keys, offsets, weights, batch_size), insert, out.data(),
                                      &lookup);
          },
          "plan"_a, "keys"_a, "offsets"_a, "weights"_a.none(), "batch_size"_a, "insert"_a, "out"_a, "lookup"_a)
      .def(
          "apply_gradients",
          [](HostStore& self, const PlanArrays& plan,
             const std::vector<
                 std::tuple<Lookup*, In<int64_t>, In<int64_t>, std::optional<In<float>>, int64_t, InRows>>& gradients,
             InRows hypers, uint64_t step, bool is_order_free) {
            std::vector<LookupGradient> parts;
            for (const auto& [lookup, keys, offsets, weights, batch_size, grad] : gradients) {
              parts.push_back({lookup, packed(keys, offsets, weights, batch_size), grad.data()});
            }
            int64_t rows = 0;
            Status status;
            {
              const nb::gil_scoped_release release;
              status = self.apply_gradients(plan.plan(), parts, hypers_of(hypers), step, is_order_free, &rows);
            }
            return std::make_tuple(status, rows);
          })
      .def(
          "find",
          [](HostStore& self, uint32_t table, In<int64_t> keys, bool insert, OutRows values, OutRows state,
             Out<bool> found) {
            const nb::gil_scoped_release release;
            return self.find(table, keys.data(), static_cast<int64_t>(keys.size()), insert, values.data(), state.data(),
                             found.data());
          })
      .def(
          "insert_or_assign",
          [](HostStore& self, uint32_t table, In<int64_t> keys, InValues values, InRows state,
             std::optional<In<int64_t>> usage) {
            const ValueType type = values.itemsize() == bytes_of(ValueType::kFloat32) ? ValueType::kFloat32 : self.type();
            check_bytes(values, type);
            int64_t inserted = 0;
            Status status;
            {
              const nb::gil_scoped_release release;
              status = self.insert_or_assign(table, keys.data(), static_cast<int64_t>(keys.size()), type, values.data(),
                                             state.data(), usage ? usage->data() : nullptr, &inserted);
            }
            return std::make_tuple(status, inserted);
          },
          "table"_a, "keys"_a, "values"_a, "state"_a, "usage"_a.none())
      .def("erase",
           [](HostStore& self, uint32_t table, In<int64_t> keys) {
             const nb::gil_scoped_release release;
             return self.erase(table, keys.data(), static_cast<int64_t>(keys.size()));
           })
      .def("export_batch",
           [](HostStore& self, uint32_t table, uint64_t cursor, uint64_t version, Out<int64_t> keys, OutValues values,
              OutRows state, Out<int64_t> usage) {
             check_bytes(values, self.type());
             int64_t rows = 0;
             Status status;
             {
               const nb::gil_scoped_release release;
               status = self.export_batch(table, &cursor, version, static_cast<int64_t>(keys.size()), keys.data(),
                                          values.data(), state.data(), usage.data(), &rows);
             }
             return std::make_tuple(status, rows, cursor);
           })
      .def("advance", &HostStore::advance, nb::call_guard<nb::gil_scoped_release>())
      .def("num_candidates", &HostStore::num_candidates)
      .def("export_candidates",
           [](HostStore& self, uint32_t table, uint64_t cursor, uint64_t version, Out<int64_t> keys, Out<int64_t> counts) {
             int64_t exported = 0;
             const Status status = self.export_candidates(table, &cursor, version, static_cast<int64_t>(keys.size()),
                                                          keys.data(), counts.data(), &exported);
             return std::make_tuple(status, exported, cursor);
           })
      .def("import_candidates",
           [](HostStore& self, uint32_t table, In<int64_t> keys, In<int64_t> counts) {
             return self.import_candidates(table, keys.data(), counts.data(), static_cast<int64_t>(keys.size()));
           })
      .def("retention",
           [](const HostStore& self, uint32_t table, Out<float> value, Out<float> state, Out<int64_t> numbers) {
             const RetentionNumbers now = self.retention(table, value.data(), state.data());
             static_assert(sizeof(now) == 10 * sizeof(int64_t));
             std::memcpy(numbers.data(), &now, sizeof(now));
           })
      .def("counters",
           [](const HostStore& self, Out<int64_t> rows, Out<int64_t> candidates, Out<int64_t> numbers) {
             self.counters(rows.data(), candidates.data(), reinterpret_cast<RetentionNumbers*>(numbers.data()));
           })
      .def("set_retention",
           [](HostStore& self, uint32_t table, In<float> value, In<float> state, In<int64_t> numbers) {
             RetentionNumbers given;
             std::memcpy(static_cast<void*>(&given), numbers.data(), sizeof(given));
             self.set_retention(table, given, value.data(), state.data());
           })
      .def("num_rows", &HostStore::num_rows)
      .def("longest_probe", &HostStore::longest_probe)
      .def("row_slots",
           [](const HostStore& self, uint32_t table, Out<uint32_t> slots) {
             if (slots.size() != self.num_rows(table)) throw nb::value_error("slots must have num_rows(table) elements");
             self.row_slots(table, slots.data());
           })
      .def("check_invariants", &HostStore::check_invariants, nb::call_guard<nb::gil_scoped_release>())
      .def("memory",
           [](const HostStore& self) {
             const StoreMemory m = self.memory();
             return std::make_tuple(m.rows, m.free_slots, m.slot_capacity, m.index_bytes, m.row_bytes);
           })
      .def_prop_ro("content_version", &HostStore::content_version)
      .def_prop_ro("isa", [](const HostStore& self) { return std::string(self.isa()); });
}

}  // namespace

NB_MODULE(_core, m) {
  // Plans in caches live until the interpreter ends, and then are not taken down one by one.
  nb::set_leak_warnings(false);
  bind_columns(m);
  bind_host_store(m);
  bind_launcher(m);
}
