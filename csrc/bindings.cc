// The only file that knows Python. Arrays come in as numpy views; the interpreter lock is released while the core works.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>

#include <memory>
#include <stdexcept>

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

std::pair<Out<int64_t>, Out<int64_t>> jagged_select(In<int64_t> values, In<int64_t> offsets, size_t features,
                                                    size_t width, In<int64_t> rows) {
  if (offsets.size() != features * width + 1 || static_cast<size_t>(offsets(features * width)) > values.size()) {
    throw std::invalid_argument("jagged_select: offsets do not fit features, width and values");
  }
  const size_t n = rows.size();
  int64_t *new_offsets, *new_values;
  auto out_offsets = make_array(features * n + 1, &new_offsets);
  bool inside;
  {
    nb::gil_scoped_release unlocked;
    inside = penstock::jagged_select_offsets(offsets.data(), features, width, rows.data(), n, new_offsets);
  }
  if (!inside) throw std::out_of_range("jagged_select: a row lies outside [0, width)");
  auto out_values = make_array(static_cast<size_t>(new_offsets[features * n]), &new_values);
  {
    nb::gil_scoped_release unlocked;
    penstock::jagged_select_values(values.data(), offsets.data(), features, width, rows.data(), n, new_offsets,
                                   new_values);
  }
  return {out_values, out_offsets};
}

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
  m.def("jagged_select", &jagged_select, "values"_a.noconvert(), "offsets"_a.noconvert(), "features"_a, "width"_a,
        "rows"_a.noconvert());
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
