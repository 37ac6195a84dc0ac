// The column functions of the data plane in Python. The interpreter lock is released while the core works.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "system/buffer_pool.h"
#include "data/columns.h"
#include "data/numbers.h"
#include "data/quoted_text.h"
#include "data/block.h"

namespace penstock {

using namespace nb::literals;

namespace {

using InArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

// Whether offsets [n + 1] rise from 0 or more to at most `end`.
template <typename Offset>
bool rise_to(const Offset* offsets, size_t n, size_t end) {
  size_t falls = 0;
  for (size_t i = 0; i < n; ++i) falls += offsets[i + 1] < offsets[i];
  return falls == 0 && offsets[0] >= 0 && static_cast<size_t>(offsets[n]) <= end;
}

template <typename Offset>
size_t num_strings(const In<Offset>& offsets, const In<uint8_t>& bytes) {
  if (offsets.size() == 0) throw std::invalid_argument("offsets: at least one expected");
  const size_t n = offsets.size() - 1;
  if (!rise_to(offsets.data(), n, bytes.size())) throw std::invalid_argument("offsets: falling, or beyond the bytes");
  return n;
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

NewArray<int64_t> as_array(const std::vector<int64_t>& values) {
  int64_t* data;
  auto out = make_array(values.size(), &data);
  std::copy(values.begin(), values.end(), data);
  return out;
}

std::tuple<NewArray<int64_t>, NewArray<int64_t>, int> py_find_row_ends(In<uint8_t> bytes, uint8_t delimiter,
                                                                       uint8_t quote, int state) {
  if (state < 0 || state > 3) throw std::invalid_argument("state: 0 to 3 expected");
  RowEnds found;
  {
    nb::gil_scoped_release unlocked;
    found = penstock::find_row_ends(bytes.data(), bytes.size(), {delimiter, quote}, static_cast<QuoteState>(state));
  }
  return {as_array(found.ends), as_array(found.odd), static_cast<int>(found.state)};
}

// Keeps the arrays alive that the block points into.
class PyJaggedBlock {
 public:
  using Column = std::tuple<In<int64_t>, std::optional<In<int64_t>>, std::optional<In<float>>>;
  using Cut = std::tuple<NewArray<int64_t>, std::optional<NewArray<int64_t>>, std::optional<NewArray<int64_t>>,
                         std::optional<NewArray<float>>>;

  PyJaggedBlock(std::vector<Column> columns, std::vector<int64_t> starts, std::vector<int64_t> stops)
      : arrays_(std::move(columns)), block_(view(arrays_, starts, stops), starts, stops) {}

  Places locate(In<int64_t> rows) const {
    Places places;
    bool inside;
    {
      nb::gil_scoped_release unlocked;
      inside = block_.locate(rows.data(), rows.size(), &places);
    }
    if (!inside) throw std::out_of_range("a row lies outside the block");
    return places;
  }

  Places locate_run(int64_t first, int64_t rows) const {
    Places places;
    if (rows < 0 || !block_.locate_run(first, static_cast<size_t>(rows), &places)) {
      throw std::out_of_range("a row lies outside the block");
    }
    return places;
  }

  Cut cut(const Places& places, int64_t batch, const Places* others, const std::vector<bool>& of_others) const {
    if (batch <= 0) throw std::invalid_argument("batch: must be positive");
    check_found_here(places);
    if (others) check_found_here(*others);
    if (others && (others->size() != places.size() || of_others.size() != block_.num_features())) {
      throw std::invalid_argument("others: as many as places, and of_others as many as features");
    }
    PlacesOfFeatures of_feature(block_.num_features(), &places);
    for (size_t f = 0; others && f < of_feature.size(); ++f) {
      if (of_others[f]) of_feature[f] = others;
    }
    const size_t n = places.size(), size = static_cast<size_t>(batch), batches = (n + size - 1) / size;
    const bool one_key = block_.one_key_a_bag();
    size_t total = block_.num_features() * n;
    std::optional<NewArray<int64_t>> out_offsets, out_starts;
    int64_t *offsets = nullptr, *starts = nullptr;
    if (!one_key) {
      out_offsets = make_array(total + batches, &offsets);
      out_starts = make_array(batches + 1, &starts);
      nb::gil_scoped_release unlocked;
      block_.cut_offsets(of_feature, n, size, offsets, starts);
      total = static_cast<size_t>(starts[batches]);
    }
    int64_t* values;
    auto out_values = make_array(total, &values);
    std::optional<NewArray<float>> out_weights;
    float* weights = nullptr;
    if (block_.has_weights()) out_weights = make_array(total, &weights);
    nb::gil_scoped_release unlocked;
    block_.cut_values(of_feature, n, size, offsets, starts, values);
    if (weights) block_.cut_weights(of_feature, n, size, offsets, starts, weights);
    return {out_values, out_offsets, out_starts, out_weights};
  }

  nb::ndarray<nb::numpy> take(const Places& places, const std::vector<InArray>& parts) const {
    check_found_here(places);
    if (parts.size() != block_.num_parts() || parts.empty()) {
      throw std::invalid_argument("parts: one for each part of the block");
    }
    std::vector<size_t> shape{places.size()};
    size_t bytes = parts[0].itemsize();
    for (size_t d = 1; d < parts[0].ndim(); ++d) {
      shape.push_back(parts[0].shape(d));
      bytes *= shape.back();
    }
    std::vector<const char*> begins;
    for (size_t p = 0; p < parts.size(); ++p) {
      bool fits = parts[p].ndim() == shape.size() && static_cast<int64_t>(parts[p].shape(0)) >= block_.stop(p) &&
                  parts[p].dtype() == parts[0].dtype();
      for (size_t d = 1; fits && d < shape.size(); ++d) fits = parts[p].shape(d) == shape[d];
      if (!fits || parts[p].itemsize() % 4 != 0) throw std::invalid_argument("parts: too short, or of unlike types or shapes");
      begins.push_back(static_cast<const char*>(parts[p].data()));
    }
    auto [data, owner] = make_memory<char>(places.size() * bytes);
    if (bytes > 0) {
      nb::gil_scoped_release unlocked;
      block_.take(places, begins, bytes, data);
    }
    return nb::ndarray<nb::numpy>(data, shape.size(), shape.data(), owner, nullptr, parts[0].dtype());
  }

 private:
  void check_found_here(const Places& places) const {
    if (places.block() != block_.number()) throw std::invalid_argument("places: found by another block");
  }

  static std::vector<penstock::JaggedColumn> view(const std::vector<Column>& columns,
                                                  const std::vector<int64_t>& starts,
                                                  const std::vector<int64_t>& stops) {
    if (starts.size() != stops.size() || (starts.empty() ? !columns.empty() : columns.size() % starts.size() != 0)) {
      throw std::invalid_argument("JaggedBlock: columns, starts and stops do not fit");
    }
    for (size_t p = 0; p < starts.size(); ++p) {
      if (starts[p] < 0 || starts[p] > stops[p]) throw std::invalid_argument("JaggedBlock: starts beyond stops");
    }
    // An empty array may have no address, which would read as no weights.
    static const float kNoWeight = 1;
    const size_t features = starts.empty() ? 0 : columns.size() / starts.size();
    std::vector<penstock::JaggedColumn> views;
    for (size_t c = 0; c < columns.size(); ++c) {
      const auto& [values, offsets, weights] = columns[c];
      const int64_t stop = stops[c / features];
      const bool fits = static_cast<size_t>(stop) + (offsets ? 1 : 0) <= (offsets ? offsets->size() : values.size());
      if (!fits) throw std::invalid_argument("JaggedBlock: a column is shorter than its part");
      const size_t start = static_cast<size_t>(starts[c / features]);
      if (offsets && !rise_to(offsets->data() + start, static_cast<size_t>(stop) - start, values.size())) {
        throw std::invalid_argument("JaggedBlock: offsets fall, or go beyond the values");
      }
      const bool first_has = std::get<2>(columns[c % features]).has_value();
      if (weights.has_value() != first_has || (weights && weights->size() != values.size())) {
        throw std::invalid_argument("JaggedBlock: weights do not fit the values");
      }
      const float* const of_values = !weights ? nullptr : weights->size() ? weights->data() : &kNoWeight;
      views.push_back({values.data(), offsets ? offsets->data() : nullptr, of_values});
    }
    return views;
  }

  std::vector<Column> arrays_;
  penstock::JaggedBlock block_;
};

void check_bits(const In<uint8_t>& valid, size_t first_bit, size_t n) {
  const size_t bits = valid.size() * 8;
  if (first_bit > bits || n > bits - first_bit) throw std::invalid_argument("valid: too few bits");
}

NewArray<int64_t> py_fill_missing(In<int64_t> values, In<uint8_t> valid, size_t first_bit, int64_t missing) {
  check_bits(valid, first_bit, values.size());
  int64_t* filled;
  auto out = make_array(values.size(), &filled);
  nb::gil_scoped_release unlocked;
  penstock::fill_missing(values.data(), valid.data(), first_bit, values.size(), missing, filled);
  return out;
}

using InNumbers = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

NumberType number_type(const InNumbers& values) {
  if (values.dtype() == nb::dtype<int32_t>()) return NumberType::kInt32;
  if (values.dtype() == nb::dtype<int64_t>()) return NumberType::kInt64;
  if (values.dtype() == nb::dtype<float>()) return NumberType::kFloat32;
  if (values.dtype() == nb::dtype<double>()) return NumberType::kFloat64;
  throw nb::type_error("values: expected int32, int64, float32 or float64");
}

std::tuple<nb::ndarray<nb::numpy, float, nb::ndim<2>>, int64_t, int64_t> py_transform_numbers(
    const std::vector<std::tuple<InNumbers, std::optional<In<uint8_t>>, size_t, NumberPlan*, size_t>>& arrays, size_t rows) {
  std::vector<NumberColumn> columns;
  const size_t width = arrays.size();
  std::vector<bool> given(width);
  for (const auto& [values, valid, first_bit, plan, position] : arrays) {
    if (valid) check_bits(*valid, first_bit, values.size());
    if (values.size() != rows) throw std::invalid_argument("values: not as many as rows");
    if (plan == nullptr) throw std::invalid_argument("plan: none");
    if (position >= width || given[position]) throw std::invalid_argument("position: not each once, from 0");
    given[position] = true;
    columns.push_back({values.data(), number_type(values), valid ? valid->data() : nullptr, first_bit, plan, position});
  }
  auto [data, owner] = make_memory<float>(rows * width);
  BadNumber bad;
  {
    nb::gil_scoped_release unlocked;
    bad = penstock::transform_numbers(columns, rows, data, width);
  }
  return {nb::ndarray<nb::numpy, float, nb::ndim<2>>(data, {rows, width}, owner), bad.column, bad.row};
}

}  // namespace

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
  nb::class_<Places>(m, "Places").def("__len__", &Places::size);
  nb::class_<PyJaggedBlock>(m, "JaggedBlock")
      .def(nb::init<std::vector<PyJaggedBlock::Column>, std::vector<int64_t>, std::vector<int64_t>>(),
           "columns"_a.noconvert(), "starts"_a, "stops"_a)
      .def("locate", &PyJaggedBlock::locate, "rows"_a.noconvert())
      .def("locate_run", &PyJaggedBlock::locate_run, "first"_a, "rows"_a)
      .def("cut", &PyJaggedBlock::cut, "places"_a, "batch"_a, "others"_a.none() = nb::none(),
           "of_others"_a = std::vector<bool>())
      .def("take", &PyJaggedBlock::take, "places"_a, "parts"_a);
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
  m.def("transform_numbers", &py_transform_numbers, "columns"_a, "rows"_a);
  m.def(
      "shuffle",
      [](uint64_t key0, uint64_t key1, size_t n) {
        int64_t* order;
        auto out = make_array(n, &order);
        nb::gil_scoped_release unlocked;
        penstock::shuffle(key0, key1, n, order);
        return out;
      },
      "key0"_a, "key1"_a, "n"_a);
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
  m.def(
      "quote_states_after",
      [](In<uint8_t> bytes, uint8_t delimiter, uint8_t quote) {
        std::array<uint8_t, 4> states;
        {
          nb::gil_scoped_release unlocked;
          states = penstock::quote_states_after(bytes.data(), bytes.size(), {delimiter, quote});
        }
        return std::make_tuple<int, int, int, int>(states[0], states[1], states[2], states[3]);
      },
      "bytes"_a.noconvert(), "delimiter"_a, "quote"_a);
  m.def("find_row_ends", &py_find_row_ends, "bytes"_a.noconvert(), "delimiter"_a, "quote"_a, "state"_a);
  m.def(
      "find_open_quote",
      [](In<uint8_t> bytes, uint8_t delimiter, uint8_t quote) {
        nb::gil_scoped_release unlocked;
        return penstock::find_open_quote(bytes.data(), bytes.size(), {delimiter, quote});
      },
      "bytes"_a.noconvert(), "delimiter"_a, "quote"_a);
}

}  // namespace penstock
