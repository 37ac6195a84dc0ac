// The row loop of FBGEMM's generated row-wise Adagrad at 16 columns, instruction by instruction, but for its prefetches and its
// indices: as it is, with SSE instructions in their old encoding between AVX ones, and with the AVX encoding of the same.
#include <chrono>
#include <cstdint>

namespace {

alignas(64) float grad[16] = {1e-3f, 2e-3f, 1e-3f};
alignas(64) float value[16];
float state[1];
int32_t dim = 16;

// Squares, their sum in halves; then `middle`, from the two halves to the new root; then the update by rate / (root + eps).
#define ROW(middle)                                                                                                       \
  __asm__ volatile(                                                                                                       \
      "vxorps %%ymm0,%%ymm0,%%ymm0\n vmovups (%0),%%ymm1\n vmulps %%ymm1,%%ymm1,%%ymm1\n vaddps %%ymm1,%%ymm0,%%ymm0\n"   \
      "vmovups 32(%0),%%ymm2\n vmulps %%ymm2,%%ymm2,%%ymm2\n vaddps %%ymm2,%%ymm0,%%ymm0\n"                               \
      "vhaddps %%ymm0,%%ymm0,%%ymm0\n vhaddps %%ymm0,%%ymm0,%%ymm0\n" middle                                              \
      "vpbroadcastd %%xmm0,%%ymm13\n vaddps %%ymm15,%%ymm13,%%ymm13\n vdivps %%ymm13,%%ymm14,%%ymm13\n"                   \
      "vmulps (%0),%%ymm13,%%ymm0\n vaddps (%1),%%ymm0,%%ymm0\n vmovups %%ymm0,(%1)\n"                                    \
      "vmulps 32(%0),%%ymm13,%%ymm1\n vaddps 32(%1),%%ymm1,%%ymm1\n vmovups %%ymm1,32(%1)\n" ::"r"(grad),                 \
      "r"(value), "r"(state), "r"(&dim)                                                                                   \
      : "xmm0", "xmm1", "xmm2", "xmm13", "xmm14", "xmm15", "memory")

template <typename Row>
double nanoseconds_a_row(int64_t rows, const Row& row) {
  const float rate = 0.05f, eps = 1e-8f;
  __asm__ volatile("vpbroadcastd %0,%%ymm14\n vpbroadcastd %1,%%ymm15" ::"x"(rate), "x"(eps) : "xmm14", "xmm15");
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < rows; ++i) row();
  const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - begin;
  __asm__ volatile("vzeroupper" ::: "xmm0", "xmm1", "xmm2", "xmm13", "xmm14", "xmm15");
  return taken.count() / static_cast<double>(rows);
}

}  // namespace

extern "C" {

double mixed(int64_t rows) {
  return nanoseconds_a_row(rows, []() __attribute__((always_inline)) {
    ROW("movss %%xmm0,%%xmm1\n vextractf128 $1,%%ymm0,%%xmm0\n addss %%xmm1,%%xmm0\n vbroadcastss (%3),%%xmm1\n"
        "vcvtdq2ps %%xmm1,%%xmm1\n divss %%xmm1,%%xmm0\n movss (%2),%%xmm1\n addss %%xmm1,%%xmm0\n"
        "movss %%xmm0,(%2)\n sqrtss %%xmm0,%%xmm0\n");
  });
}

double avx_alone(int64_t rows) {
  return nanoseconds_a_row(rows, []() __attribute__((always_inline)) {
    ROW("vmovss %%xmm0,%%xmm1,%%xmm1\n vextractf128 $1,%%ymm0,%%xmm0\n vaddss %%xmm1,%%xmm0,%%xmm0\n"
        "vbroadcastss (%3),%%xmm1\n vcvtdq2ps %%xmm1,%%xmm1\n vdivss %%xmm1,%%xmm0,%%xmm0\n vmovss (%2),%%xmm1\n"
        "vaddss %%xmm1,%%xmm0,%%xmm0\n vmovss %%xmm0,(%2)\n vsqrtss %%xmm0,%%xmm0,%%xmm0\n");
  });
}

}  // extern "C"
