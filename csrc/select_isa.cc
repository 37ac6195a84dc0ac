#include "row_kernels.h"

namespace penstock {

uint32_t optimizer_state_dim(OptimizerKind optimizer, uint32_t dim) {
  switch (optimizer) {
    case OptimizerKind::kSgd:
      return 0;
    case OptimizerKind::kAdagrad:
      return dim;
    case OptimizerKind::kRowWiseAdagrad:
      return 1;
    case OptimizerKind::kAdam:
      break;
  }
  return 2 * dim;
}

RowKernels select_row_kernels(uint32_t dim, OptimizerKind optimizer, const char** isa) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    *isa = "avx512";
    return isa_avx512::row_kernels(dim, optimizer);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) {
    *isa = "avx2";
    return isa_avx2::row_kernels(dim, optimizer);
  }
#endif
  *isa = "generic";
  return isa_generic::row_kernels(dim, optimizer);
}

}  // namespace penstock
