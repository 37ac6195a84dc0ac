// Starts compiled GPU kernels through the driver, with the least work of the host.
//
// Which compiled form of a kernel fits depends on the types of its arguments and on some of their values (a pointer's
// alignment, an integer of 1, ...): their kinds. Forms are told apart by comparing kinds, one word an argument.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace penstock {

struct KernelArgument {
  uint64_t value;  // pointer or integer
  uint64_t kind;
};

struct KernelForm {
  std::vector<uint64_t> kinds;
  std::vector<size_t> passed;  // arguments that are parameters; the others are compiled in
  void* function;
  uint32_t threads;
  uint32_t shared_bytes;
};

struct Grid {
  uint32_t x, y, z;
};

constexpr size_t kMostParameters = 64;

class KernelLauncher {
 public:
  // cuLaunchKernel.
  using Launch = int (*)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                         unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters,
                         void** extra);

  // The driver's; null: no driver on this machine.
  static Launch driver_launch();

  explicit KernelLauncher(Launch launch) : launch_(launch) {}

  void add(size_t kernel, KernelForm form);

  // The form that fits, or null.
  const KernelForm* find(size_t kernel, const std::vector<KernelArgument>& arguments) const;

  // Status of the driver; 0: started.
  int start(const KernelForm& form, const Grid& grid, void* stream, const std::vector<KernelArgument>& arguments) const;

 private:
  Launch launch_;
  std::vector<std::vector<KernelForm>> forms_;  // by kernel
};

}  // namespace penstock
