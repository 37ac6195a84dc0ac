// The only file that knows Python. Arrays come in as numpy views; the interpreter lock is released while the core works.
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

#include "buffer_pool.h"
#include "columns.h"
#include "host_store.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace penstock;

namespace {

template <typename T>
using In = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Out = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using InRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
// Row values in the type that a store keeps them in: float32, or the bits of a narrow type.
using InValues = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutValues = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;

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

template <typename T>
using NewArray = nb::ndarray<nb::numpy, T, nb::ndim<1>, nb::c_contig>;

// An uninitialised numpy array of `n` elements; `data` is where to write them.
template <typename T>
NewArray<T> make_array(size_t n, T** data) {
  std::unique_ptr<T[]> memory(new T[n]);
  *data = memory.get();
  nb::capsule owner(memory.get(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return NewArray<T>(memory.release(), {n}, owner);
}

template <typename Offset>
size_t num_strings(const In<Offset>& offsets, const In<uint8_t>& bytes) {
  const size_t n = offsets.size();
  if (n == 0) throw std::invalid_argument("offsets: at least one expected");
  if (offsets(0) < 0 || static_cast<size_t>(offsets(n - 1)) > bytes.size()) {
    throw std::invalid_argument("offsets: beyond the bytes");
  }
  return n - 1;
}

template <typename Offset>
NewArray<int64_t> py_hash_strings(In<Offset> offsets, In<uint8_t> bytes, uint64_t seed, uint64_t buckets) {
  const size_t n = num_strings(offsets, bytes);
  int64_t* keys;
  auto out = make_array(n, &keys);
  nb::gil_scoped_release unlocked;
  penstock::hash_strings(offsets.data(), bytes.data(), n, seed, buckets, keys);
  return out;
}

template <typename Integer>
NewArray<int64_t> py_hash_integers(In<Integer> values, uint64_t seed, uint64_t buckets) {
  int64_t* keys;
  auto out = make_array(values.size(), &keys);
  nb::gil_scoped_release unlocked;
  penstock::hash_integers(values.data(), values.size(), seed, buckets, keys);
  return out;
}

template <typename Offset>
std::pair<NewArray<int64_t>, int64_t> py_parse_hex(In<Offset> offsets, In<uint8_t> bytes) {
  const size_t n = num_strings(offsets, bytes);
  int64_t* keys;
  auto out = make_array(n, &keys);
  int64_t bad;
  {
    nb::gil_scoped_release unlocked;
    bad = penstock::parse_hex(offsets.data(), bytes.data(), n, keys);
  }
  return {out, bad};
}

// Keeps the arrays alive that the window points into.
class PyJaggedWindow {
 public:
  using Column = std::tuple<In<int64_t>, std::optional<In<int64_t>>, std::optional<In<float>>>;
  using Cut = std::tuple<NewArray<int64_t>, std::optional<NewArray<int64_t>>, std::optional<NewArray<int64_t>>,
                         std::optional<NewArray<float>>>;

  PyJaggedWindow(std::vector<Column> columns, std::vector<int64_t> starts, std::vector<int64_t> stops)
      : arrays_(std::move(columns)), window_(view(arrays_, starts, stops), starts, stops) {}

  Cut cut(In<int64_t> rows, int64_t batch, std::optional<In<int64_t>> others, const std::vector<bool>& of_others) const {
    if (batch <= 0) throw std::invalid_argument("batch: must be positive");
    if (others && (others->size() != rows.size() || of_others.size() != window_.num_features())) {
      throw std::invalid_argument("others: as many as rows, and of_others as many as features");
    }
    const auto size = static_cast<size_t>(batch);
    return window_.has_small_places() ? cut_places<uint32_t>(rows, size, others, of_others)
                                      : cut_places<uint64_t>(rows, size, others, of_others);
  }

 private:
  template <typename Place>
  Cut cut_places(const In<int64_t>& rows, size_t batch, const std::optional<In<int64_t>>& others,
                 const std::vector<bool>& of_others) const {
    const size_t n = rows.size(), batches = (n + batch - 1) / batch;
    const std::unique_ptr<Place[]> places(new Place[n]), other_places(others ? new Place[n] : nullptr);
    std::vector<const Place*> of_feature(window_.num_features(), places.get());
    if (others) {
      for (size_t f = 0; f < of_feature.size(); ++f) {
        if (of_others[f]) of_feature[f] = other_places.get();
      }
    }
    const bool one_key = window_.one_key_a_bag();
    size_t total = window_.num_features() * n;
    std::optional<NewArray<int64_t>> out_offsets, out_starts;
    int64_t *offsets = nullptr, *starts = nullptr;
    if (!one_key) {
      out_offsets = make_array(total + batches, &offsets);
      out_starts = make_array(batches + 1, &starts);
    }
    bool inside;
    {
      nb::gil_scoped_release unlocked;
      inside = window_.locate(rows.data(), n, places.get()) &&
               (!others || window_.locate(others->data(), n, other_places.get()));
      if (inside && !one_key) window_.cut_offsets(of_feature.data(), n, batch, offsets, starts);
    }
    if (!inside) throw std::out_of_range("a row lies outside the window");
    if (!one_key) total = static_cast<size_t>(starts[batches]);
    int64_t* values;
    auto out_values = make_array(total, &values);
    std::optional<NewArray<float>> out_weights;
    float* weights = nullptr;
    if (window_.has_weights()) out_weights = make_array(total, &weights);
    {
      nb::gil_scoped_release unlocked;
      window_.cut_values(of_feature.data(), n, batch, offsets, starts, values);
      if (weights) window_.cut_weights(of_feature.data(), n, batch, offsets, starts, weights);
    }
    return {out_values, out_offsets, out_starts, out_weights};
  }

  static std::vector<penstock::JaggedColumn> view(const std::vector<Column>& columns,
                                                  const std::vector<int64_t>& starts,
                                                  const std::vector<int64_t>& stops) {
    if (starts.size() != stops.size() || (starts.empty() ? !columns.empty() : columns.size() % starts.size() != 0)) {
      throw std::invalid_argument("JaggedWindow: columns, starts and stops do not fit");
    }
    // An empty array may have no address, which would read as no weights.
    static const float kNoWeight = 1;
    const size_t features = starts.empty() ? 0 : columns.size() / starts.size();
    std::vector<penstock::JaggedColumn> views;
    for (size_t c = 0; c < columns.size(); ++c) {
      const auto& [values, offsets, weights] = columns[c];
      const int64_t stop = stops[c / features];
      const bool fits = starts[c / features] >= 0 && starts[c / features] <= stop &&
                        static_cast<size_t>(stop) + (offsets ? 1 : 0) <= (offsets ? offsets->size() : values.size());
      if (!fits || (offsets && static_cast<size_t>((*offsets)(stop)) > values.size())) {
        throw std::invalid_argument("JaggedWindow: a column is shorter than its part");
      }
      const bool first_has = std::get<2>(columns[c % features]).has_value();
      if (weights.has_value() != first_has || (weights && weights->size() != values.size())) {
        throw std::invalid_argument("JaggedWindow: weights do not fit the values");
      }
      const float* const of_values = !weights ? nullptr : weights->size() ? weights->data() : &kNoWeight;
      views.push_back({values.data(), offsets ? offsets->data() : nullptr, of_values});
    }
    return views;
  }

  std::vector<Column> arrays_;
  penstock::JaggedWindow window_;
};

void check_bits(const In<uint8_t>& valid, size_t first_bit, size_t n) {
  if (valid.size() * 8 < first_bit + n) throw std::invalid_argument("valid: too few bits");
}

NewArray<int64_t> py_fill_missing(In<int64_t> values, In<uint8_t> valid, size_t first_bit, int64_t missing) {
  check_bits(valid, first_bit, values.size());
  int64_t* filled;
  auto out = make_array(values.size(), &filled);
  nb::gil_scoped_release unlocked;
  penstock::fill_missing(values.data(), valid.data(), first_bit, values.size(), missing, filled);
  return out;
}

template <typename T>
void bind_transform_numbers(nb::module_& m) {
  m.def(
      "transform_numbers",
      [](In<T> values, std::optional<In<uint8_t>> valid, size_t first_bit, const NumberPlan& plan, OutRows out,
         size_t column) {
        if (valid) check_bits(*valid, first_bit, values.size());
        if (out.shape(0) != values.size() || column >= out.shape(1)) throw std::invalid_argument("out: wrong shape");
        nb::gil_scoped_release unlocked;
        return penstock::transform_numbers(values.data(), valid ? valid->data() : nullptr, first_bit, values.size(),
                                           plan, out.data() + column, out.shape(1));
      },
      "values"_a.noconvert(), "valid"_a.noconvert().none(), "first_bit"_a, "plan"_a, "out"_a.noconvert(), "column"_a);
}

void bind_columns(nb::module_& m) {
  m.def(
      "xxh64", [](nb::bytes data, uint64_t seed) { return penstock::xxh64(data.c_str(), data.size(), seed); },
      "data"_a, "seed"_a = 0);
  // .noconvert(): a wrong dtype is an error, never a hidden copy.
  m.def("hash_strings", &py_hash_strings<int32_t>, "offsets"_a.noconvert(), "bytes"_a.noconvert(), "seed"_a = 0,
        "buckets"_a = 0);
  m.def("hash_strings", &py_hash_strings<int64_t>, "offsets"_a.noconvert(), "bytes"_a.noconvert(), "seed"_a = 0,
        "buckets"_a = 0);
  m.def("hash_integers", &py_hash_integers<int64_t>, "values"_a.noconvert(), "seed"_a = 0, "buckets"_a = 0);
  m.def("hash_integers", &py_hash_integers<uint64_t>, "values"_a.noconvert(), "seed"_a = 0, "buckets"_a = 0);
  m.def("parse_hex", &py_parse_hex<int32_t>, "offsets"_a.noconvert(), "bytes"_a.noconvert());
  m.def("parse_hex", &py_parse_hex<int64_t>, "offsets"_a.noconvert(), "bytes"_a.noconvert());
  nb::class_<PyJaggedWindow>(m, "JaggedWindow")
      .def(nb::init<std::vector<PyJaggedWindow::Column>, std::vector<int64_t>, std::vector<int64_t>>(),
           "columns"_a.noconvert(), "starts"_a, "stops"_a)
      .def("cut", &PyJaggedWindow::cut, "rows"_a.noconvert(), "batch"_a, "others"_a.noconvert().none() = nb::none(),
           "of_others"_a = std::vector<bool>());
  m.def(
      "cross_keys",
      [](In<int64_t> keys, std::optional<In<uint8_t>> valid, size_t first_bit, Out<uint64_t> hashes) {
        if (valid) check_bits(*valid, first_bit, keys.size());
        if (hashes.size() != keys.size()) throw std::invalid_argument("hashes: wrong length");
        nb::gil_scoped_release unlocked;
        penstock::cross_keys(keys.data(), valid ? valid->data() : nullptr, first_bit, keys.size(), hashes.data());
      },
      "keys"_a.noconvert(), "valid"_a.noconvert().none(), "first_bit"_a, "hashes"_a.noconvert());
  m.def("fill_missing", &py_fill_missing, "values"_a.noconvert(), "valid"_a.noconvert(), "first_bit"_a, "missing"_a);
  nb::class_<NumberPlan>(m, "NumberPlan")
      .def("__init__",
           [](NumberPlan* self, std::optional<double> fill, std::vector<std::tuple<int, double, double>> steps) {
             new (self) NumberPlan{fill.has_value(), fill.value_or(0.0), {}};
             for (const auto& [kind, a, b] : steps) self->steps.push_back({kind, a, b});
           },
           "fill"_a.none(), "steps"_a);
  bind_transform_numbers<int32_t>(m);
  bind_transform_numbers<int64_t>(m);
  bind_transform_numbers<float>(m);
  bind_transform_numbers<double>(m);
  m.def(
      "argsort_bits",
      [](In<uint64_t> values) {
        int64_t* order;
        auto out = make_array(values.size(), &order);
        nb::gil_scoped_release unlocked;
        penstock::argsort_bits(values.data(), values.size(), order);
        return out;
      },
      "values"_a.noconvert());
  m.def(
      "find_non_object",
      [](In<uint8_t> bytes) {
        nb::gil_scoped_release unlocked;
        return penstock::find_non_object(bytes.data(), bytes.size());
      },
      "bytes"_a.noconvert());
  m.def(
      "count_newlines",
      [](In<uint8_t> bytes) {
        nb::gil_scoped_release unlocked;
        return penstock::count_newlines(bytes.data(), bytes.size());
      },
      "bytes"_a.noconvert());
}

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
  m.def("buffer_pool", [] { return std::make_shared<BufferPool>(); });

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
             uint64_t max_bytes) {
            std::vector<TableRules> rules;
            for (const auto& [kind, scale, state, seed, retention] : tables) {
              rules.push_back({{static_cast<InitializerKind>(kind), scale, state, seed}, retention});
            }
            new (self) HostStore(dim, static_cast<ValueType>(value_type), state_dim, usage_dim,
                                 static_cast<OptimizerKind>(optimizer), rules, num_threads, max_bytes);
          },
          nb::kw_only(), "dim"_a, "value_type"_a, "state_dim"_a, "usage_dim"_a, "optimizer"_a, "tables"_a, "num_threads"_a, "max_bytes"_a)
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
             static_assert(sizeof(now) == 9 * sizeof(int64_t));
             std::memcpy(numbers.data(), &now, sizeof(now));
           })
      .def("set_retention",
           [](HostStore& self, uint32_t table, In<float> value, In<float> state, In<int64_t> numbers) {
             RetentionNumbers given;
             std::memcpy(&given, numbers.data(), sizeof(given));
             self.set_retention(table, given, value.data(), state.data());
           })
      .def("num_rows", &HostStore::num_rows)
      .def("longest_probe", &HostStore::longest_probe)
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
  bind_columns(m);
  bind_host_store(m);
}
