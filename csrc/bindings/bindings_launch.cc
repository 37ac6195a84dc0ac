// Launches of GPU kernels with Python's arguments: tensors and integers.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "system/kernel_launcher.h"

namespace penstock {
namespace {

constexpr int64_t kAligned = 16;  // bytes, or the factor of an integer, that Triton compiles for

uint64_t kind_of_integer(int64_t value) {
  const bool is_wide = value != static_cast<int32_t>(value);
  return uint64_t{value == 1} | uint64_t{value % kAligned == 0} << 1 | uint64_t{is_wide} << 2;
}

// Reads tensors by their attributes: no torch to link with.
class ArgumentReader {
 public:
  // Throws nb::python_error if an argument is neither tensor nor integer.
  const std::vector<KernelArgument>& read(nb::handle tuple) {
    const Py_ssize_t count = PyTuple_Size(tuple.ptr());
    arguments_.clear();
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* const argument = PyTuple_GetItem(tuple.ptr(), i);
      if (argument == nullptr) throw nb::python_error();
      arguments_.push_back(PyLong_Check(argument) ? integer(argument) : tensor(argument));
    }
    return arguments_;
  }

 private:
  static KernelArgument integer(PyObject* argument) {
    const int64_t value = PyLong_AsLongLong(argument);
    if (value == -1 && PyErr_Occurred() != nullptr) throw nb::python_error();
    return {static_cast<uint64_t>(value), kind_of_integer(value)};
  }

  KernelArgument tensor(PyObject* argument) const {
    const nb::object pointer = nb::steal(PyObject_CallMethodObjArgs(argument, data_ptr_.ptr(), nullptr));
    const nb::object dtype = nb::steal(PyObject_GetAttr(argument, dtype_.ptr()));
    if (!pointer.is_valid() || !dtype.is_valid()) throw nb::python_error();
    const uint64_t place = PyLong_AsUnsignedLongLong(pointer.ptr());
    if (PyErr_Occurred() != nullptr) throw nb::python_error();
    // There is one object of each dtype, at an even address, and it is never freed.
    return {place, reinterpret_cast<uint64_t>(dtype.ptr()) << 1 | uint64_t{place % kAligned == 0}};
  }

  nb::object data_ptr_ = nb::steal(PyUnicode_InternFromString("data_ptr"));
  nb::object dtype_ = nb::steal(PyUnicode_InternFromString("dtype"));
  std::vector<KernelArgument> arguments_;
};

// Used with the GIL held.
class PythonLauncher {
 public:
  explicit PythonLauncher(uint64_t launch) : launcher_(entry(launch)) {}

  bool launch(size_t kernel, uint64_t stream, const std::vector<uint32_t>& grid, nb::tuple arguments) {
    const std::vector<KernelArgument>& read = reader_.read(arguments);
    const KernelForm* const form = launcher_.find(kernel, read);
    if (form == nullptr) return false;
    const auto size = [&grid](size_t axis) { return axis < grid.size() ? grid[axis] : 1; };
    const int status =
        launcher_.start(*form, {size(0), size(1), size(2)}, reinterpret_cast<void*>(stream), read);
    if (status != 0) throw std::runtime_error("the GPU's driver refuses a launch: CUDA error " + std::to_string(status));
    return true;
  }

  void add(size_t kernel, nb::tuple arguments, const std::vector<std::string>& types, uint64_t function, uint32_t threads,
           uint32_t shared_bytes) {
    KernelForm form{{}, {}, reinterpret_cast<void*>(function), threads, shared_bytes};
    for (const KernelArgument& argument : reader_.read(arguments)) form.kinds.push_back(argument.kind);
    if (types.size() != form.kinds.size() || types.size() > kMostParameters) {
      throw std::invalid_argument("a kernel of " + std::to_string(form.kinds.size()) + " arguments and " +
                                  std::to_string(types.size()) + " types");
    }
    for (size_t i = 0; i < types.size(); ++i) {
      if (is_passed(types[i])) form.passed.push_back(i);
    }
    launcher_.add(kernel, std::move(form));
  }

 private:
  static KernelLauncher::Launch entry(uint64_t address) {
    if (address != 0) return reinterpret_cast<KernelLauncher::Launch>(address);
    const KernelLauncher::Launch launch = KernelLauncher::driver_launch();
    if (launch == nullptr) throw std::runtime_error("no NVIDIA driver (libcuda.so.1) on this machine");
    return launch;
  }

  static bool is_passed(const std::string& type) {
    if (type != "constexpr" && type != "i32" && type != "i64" && type[0] != '*') {
      throw std::invalid_argument("a kernel's argument of type " + type);
    }
    return type != "constexpr";
  }

  KernelLauncher launcher_;
  ArgumentReader reader_;
};

}  // namespace

void bind_launcher(nb::module_& m) {
  nb::class_<PythonLauncher>(m, "KernelLauncher")
      .def(nb::init<uint64_t>(), nb::arg("launch") = 0)
      .def("launch", &PythonLauncher::launch)
      .def("add", &PythonLauncher::add);
}

}  // namespace penstock
