// The only file that knows Python. Arrays come in as numpy views; the interpreter lock is released while the core works.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "columns.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <typename T>
using In = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Out = nb::ndarray<nb::numpy, T, nb::ndim<1>, nb::c_contig>;

// An uninitialised numpy array of `n` elements; `data` is where to write them.
template <typename T>
Out<T> make_array(size_t n, T** data) {
  std::unique_ptr<T[]> memory(new T[n]);
  *data = memory.get();
  nb::capsule owner(memory.get(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return Out<T>(memory.release(), {n}, owner);
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
Out<int64_t> hash_strings(In<Offset> offsets, In<uint8_t> bytes, uint64_t seed, uint64_t buckets) {
  const size_t n = num_strings(offsets, bytes);
  int64_t* keys;
  auto out = make_array(n, &keys);
  nb::gil_scoped_release unlocked;
  penstock::hash_strings(offsets.data(), bytes.data(), n, seed, buckets, keys);
  return out;
}

template <typename Integer>
Out<int64_t> hash_integers(In<Integer> values, uint64_t seed, uint64_t buckets) {
  int64_t* keys;
  auto out = make_array(values.size(), &keys);
  nb::gil_scoped_release unlocked;
  penstock::hash_integers(values.data(), values.size(), seed, buckets, keys);
  return out;
}

template <typename Offset>
std::pair<Out<int64_t>, int64_t> parse_hex(In<Offset> offsets, In<uint8_t> bytes) {
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
  using Column = std::pair<In<int64_t>, std::optional<In<int64_t>>>;

  PyJaggedWindow(std::vector<Column> columns, std::vector<int64_t> starts, std::vector<int64_t> stops)
      : arrays_(std::move(columns)), window_(view(arrays_, starts, stops), starts, stops) {}

  std::pair<Out<int64_t>, Out<int64_t>> select(In<int64_t> rows) const {
    const size_t n = rows.size(), bags = window_.num_features() * n;
    const std::unique_ptr<penstock::JaggedWindow::Place[]> places(new penstock::JaggedWindow::Place[n]);
    int64_t *offsets, *values;
    auto out_offsets = make_array(bags + 1, &offsets);
    bool inside;
    {
      nb::gil_scoped_release unlocked;
      inside = window_.locate(rows.data(), n, places.get());
      if (inside) window_.select_offsets(places.get(), n, offsets);
    }
    if (!inside) throw std::out_of_range("a row lies outside the window");
    auto out_values = make_array(static_cast<size_t>(offsets[bags]), &values);
    {
      nb::gil_scoped_release unlocked;
      window_.select_values(places.get(), n, offsets, values);
    }
    return {out_values, out_offsets};
  }

 private:
  static std::vector<penstock::JaggedColumn> view(const std::vector<Column>& columns,
                                                  const std::vector<int64_t>& starts,
                                                  const std::vector<int64_t>& stops) {
    if (starts.size() != stops.size() || (starts.empty() ? !columns.empty() : columns.size() % starts.size() != 0)) {
      throw std::invalid_argument("JaggedWindow: columns, starts and stops do not fit");
    }
    const size_t features = starts.empty() ? 0 : columns.size() / starts.size();
    std::vector<penstock::JaggedColumn> views;
    for (size_t c = 0; c < columns.size(); ++c) {
      const auto& [values, offsets] = columns[c];
      const int64_t stop = stops[c / features];
      const bool fits = starts[c / features] >= 0 && starts[c / features] <= stop &&
                        static_cast<size_t>(stop) + (offsets ? 1 : 0) <= (offsets ? offsets->size() : values.size());
      if (!fits || (offsets && static_cast<size_t>((*offsets)(stop)) > values.size())) {
        throw std::invalid_argument("JaggedWindow: a column is shorter than its part");
      }
      views.push_back({values.data(), offsets ? offsets->data() : nullptr});
    }
    return views;
  }

  std::vector<Column> arrays_;
  penstock::JaggedWindow window_;
};

void bind_columns(nb::module_& m) {
  m.def(
      "xxh64", [](nb::bytes data, uint64_t seed) { return penstock::xxh64(data.c_str(), data.size(), seed); },
      "data"_a, "seed"_a = 0);
  // .noconvert(): a wrong dtype is an error, never a hidden copy.
  m.def("hash_strings", &hash_strings<int32_t>, "offsets"_a.noconvert(), "bytes"_a.noconvert(), "seed"_a = 0,
        "buckets"_a = 0);
  m.def("hash_strings", &hash_strings<int64_t>, "offsets"_a.noconvert(), "bytes"_a.noconvert(), "seed"_a = 0,
        "buckets"_a = 0);
  m.def("hash_integers", &hash_integers<int64_t>, "values"_a.noconvert(), "seed"_a = 0, "buckets"_a = 0);
  m.def("hash_integers", &hash_integers<uint64_t>, "values"_a.noconvert(), "seed"_a = 0, "buckets"_a = 0);
  m.def("parse_hex", &parse_hex<int32_t>, "offsets"_a.noconvert(), "bytes"_a.noconvert());
  m.def("parse_hex", &parse_hex<int64_t>, "offsets"_a.noconvert(), "bytes"_a.noconvert());
  nb::class_<PyJaggedWindow>(m, "JaggedWindow")
      .def(nb::init<std::vector<PyJaggedWindow::Column>, std::vector<int64_t>, std::vector<int64_t>>(),
           "columns"_a.noconvert(), "starts"_a, "stops"_a)
      .def("select", &PyJaggedWindow::select, "rows"_a.noconvert());
  m.def(
      "count_newlines",
      [](In<uint8_t> bytes) {
        nb::gil_scoped_release unlocked;
        return penstock::count_newlines(bytes.data(), bytes.size());
      },
      "bytes"_a.noconvert());
}

}  // namespace

NB_MODULE(_core, m) {
  bind_columns(m);
}
