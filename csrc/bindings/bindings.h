// What the files that know Python share: arrays come in as numpy views and go out as numpy arrays.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <memory>
#include <new>
#include <utility>

#include "system/buffer_pool.h"

namespace penstock {

namespace nb = nanobind;

template <typename T>
using In = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Out = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using InRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

inline void check(bool is_right, const char* what) {
  if (!is_right) throw nb::value_error(what);
}

template <typename Rows>
void check_rows(const Rows& rows, size_t count, size_t width, const char* what) {
  check(rows.shape(0) == count && rows.shape(1) == width, what);
}

template <typename T>
using NewArray = nb::ndarray<nb::numpy, T, nb::ndim<1>, nb::c_contig>;

// From here on an array comes from the pool: its threads give it back to others, whose heaps would fault it in anew.
inline constexpr size_t kPooledBytes = size_t{128} << 10;
inline constexpr size_t kMaxIdleArrayBytes = size_t{256} << 20;

inline BufferPool& array_pool() {
  static const auto pool = std::make_shared<BufferPool>(kMaxIdleArrayBytes);
  return *pool;
}

// Uninitialised memory and what frees it.
template <typename T>
std::pair<T*, nb::capsule> make_memory(size_t n) {
  if (n * sizeof(T) < kPooledBytes) {
    std::unique_ptr<T[]> memory(new T[n]);
    T* const data = memory.get();
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    memory.release();
    return {data, owner};
  }
  std::unique_ptr<BufferPool::Loan> loan = array_pool().take(n * sizeof(T));
  if (!loan) throw std::bad_alloc();
  T* const data = reinterpret_cast<T*>(loan->region.data());
  nb::capsule owner(loan.get(), [](void* p) noexcept { delete static_cast<BufferPool::Loan*>(p); });
  loan.release();
  return {data, owner};
}

// An uninitialised numpy array of `n` elements; `data` is where to write them.
template <typename T>
NewArray<T> make_array(size_t n, T** data) {
  auto [memory, owner] = make_memory<T>(n);
  *data = memory;
  return NewArray<T>(memory, {n}, owner);
}

// Of the package, and of all sources: see penstock/built_core.py, which writes them.
extern const char* const kVersion;
extern const char* const kBuiltFrom;

// Column functions of the data plane.
void bind_columns(nb::module_& m);

// Launches of GPU kernels.
void bind_bag_sums(nb::module_& m);
void bind_launcher(nb::module_& m);

}  // namespace penstock
