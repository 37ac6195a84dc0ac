// Implementation of system/kernel_launcher.h.
#include "system/kernel_launcher.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <utility>

namespace penstock {
namespace {

// Kernels compiled by Triton take two pointers to scratch memory after their own parameters; ours use none.
constexpr size_t kScratchPointers = 2;

}  // namespace

KernelLauncher::Launch KernelLauncher::driver_launch() {
  void* const driver = dlopen("libcuda.so.1", RTLD_LAZY);
  return driver == nullptr ? nullptr : reinterpret_cast<Launch>(dlsym(driver, "cuLaunchKernel"));
}

void KernelLauncher::add(size_t kernel, KernelForm form) {
  if (forms_.size() <= kernel) forms_.resize(kernel + 1);
  forms_[kernel].push_back(std::move(form));
}

const KernelForm* KernelLauncher::find(size_t kernel, const std::vector<KernelArgument>& arguments) const {
  if (kernel >= forms_.size()) return nullptr;
  const auto fits = [](const KernelArgument& argument, uint64_t kind) { return argument.kind == kind; };
  for (const KernelForm& form : forms_[kernel]) {
    const std::vector<uint64_t>& kinds = form.kinds;
    if (std::equal(arguments.begin(), arguments.end(), kinds.begin(), kinds.end(), fits)) return &form;
  }
  return nullptr;
}

int KernelLauncher::start(const KernelForm& form, const Grid& grid, void* stream,
                          const std::vector<KernelArgument>& arguments) const {
  std::array<void*, kMostParameters + kScratchPointers> places;
  size_t count = 0;
  // The driver reads as many bytes of each as the parameter has: the low ones come first.
  for (const size_t i : form.passed) places[count++] = const_cast<uint64_t*>(&arguments[i].value);
  uint64_t no_scratch = 0;
  for (size_t i = 0; i < kScratchPointers; ++i) places[count++] = &no_scratch;
  return launch_(form.function, grid.x, grid.y, grid.z, form.threads, 1, 1, form.shared_bytes, stream, places.data(),
                 nullptr);
}

}  // namespace penstock
