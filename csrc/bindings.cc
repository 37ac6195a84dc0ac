// The only file that knows Python. Arrays come in as numpy views; the interpreter lock is released while the core works.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "columns.h"

namespace nb = nanobind;

namespace {

void bind_columns(nb::module_& m) {
  m.def(
      "xxh64", [](nb::bytes data, uint64_t seed) { return penstock::xxh64(data.c_str(), data.size(), seed); },
      nb::arg("data"), nb::arg("seed") = 0);
}

}  // namespace

NB_MODULE(_core, m) {
  bind_columns(m);
}
