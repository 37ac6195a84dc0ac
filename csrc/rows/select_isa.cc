// Picks the instruction set of this machine.
#include "rows/row_kernels.h"

namespace penstock {

RowKernels select_row_kernels(uint32_t dim, ValueType type, OptimizerKind optimizer, [[maybe_unused]] std::string_view most,
                              const char** isa) {
#ifdef PENSTOCK_HAS_X86_KERNELS
  if ((most.empty() || most == "avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    *isa = "avx512";
    return isa_avx512::row_kernels(dim, type, optimizer);
  }
  if (most != "generic" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c")) {
    *isa = "avx2";
    return isa_avx2::row_kernels(dim, type, optimizer);
  }
#endif
  *isa = "generic";
  return isa_generic::row_kernels(dim, type, optimizer);
}

}  // namespace penstock
