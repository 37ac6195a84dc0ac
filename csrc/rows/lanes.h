// Sixteen floats at a time, whatever the instruction set; part of row_kernels.cc, in the namespace of its build.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef PENSTOCK_ISA
#error "PENSTOCK_ISA must name the namespace of this build"
#endif

namespace penstock {
namespace PENSTOCK_ISA {
namespace {

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

// Dim known to the compiler (D > 0) or at run time (D == 0).
template <int D>
struct Shape {
  explicit Shape(uint32_t) {}
  static constexpr int dim() { return D; }
};
template <>
struct Shape<0> {
  explicit Shape(uint32_t dim) : dim_(static_cast<int>(dim)) {}
  int dim() const { return dim_; }
  int dim_;
};

// Lanes that a run-time dim can need; config allows 4096 columns.
constexpr int kMaxChunks = 4096 / kLanes;
template <int D>
constexpr int kChunks = D == 0 ? kMaxChunks : (D + kLanes - 1) / kLanes;

template <typename S>
inline int num_chunks(const S& shape) {
  return (shape.dim() + kLanes - 1) / kLanes;
}

template <typename S>
inline int width(const S& shape, int chunk) {
  const int left = shape.dim() - chunk * kLanes;
  return left < kLanes ? left : kLanes;
}

// Columns beyond the dim read as 0.
template <typename S>
inline Lanes load(const S& shape, const float* row, int chunk) {
  Lanes lanes = {};
  if (width(shape, chunk) == kLanes) {
    std::memcpy(&lanes, row + chunk * kLanes, sizeof(Lanes));
  } else {
    std::memcpy(&lanes, row + chunk * kLanes, width(shape, chunk) * sizeof(float));
  }
  return lanes;
}

template <typename S>
inline void store(const S& shape, float* row, int chunk, Lanes lanes) {
  if (width(shape, chunk) == kLanes) {
    std::memcpy(row + chunk * kLanes, &lanes, sizeof(Lanes));
  } else {
    std::memcpy(row + chunk * kLanes, &lanes, width(shape, chunk) * sizeof(float));
  }
}

// Writes past the caches where the row is whole cache lines; else an ordinary store.
template <typename S>
inline void store_streaming(const S& shape, float* row, int chunk, Lanes lanes) {
#if defined(__AVX512F__)
  if (width(shape, chunk) == kLanes && reinterpret_cast<uintptr_t>(row) % 64 == 0) {
    __m512 value;
    std::memcpy(&value, &lanes, sizeof(value));
    _mm512_stream_ps(row + chunk * kLanes, value);
    return;
  }
#elif defined(__AVX2__)
  if (width(shape, chunk) == kLanes && reinterpret_cast<uintptr_t>(row) % 32 == 0) {
    __m256 half[2];
    std::memcpy(half, &lanes, sizeof(half));
    _mm256_stream_ps(row + chunk * kLanes, half[0]);
    _mm256_stream_ps(row + chunk * kLanes + 8, half[1]);
    return;
  }
#endif
  store(shape, row, chunk, lanes);
}

inline Lanes square_root(Lanes x) {
  float lane[kLanes];
  std::memcpy(lane, &x, sizeof(lane));
  for (int i = 0; i < kLanes; ++i) lane[i] = __builtin_sqrtf(lane[i]);
  std::memcpy(&x, lane, sizeof(lane));
  return x;
}

// Fixed tree, so that all instruction sets and dims add in one order.
inline float horizontal_sum(Lanes x) {
  float lane[kLanes];
  std::memcpy(lane, &x, sizeof(lane));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

template <int kWrite, int kLocality>
[[gnu::always_inline]] inline void prefetch_bytes(const void* first, size_t bytes) {
  const char* const begin = static_cast<const char*>(first);
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(begin + line, kWrite, kLocality);
  // Bytes that do not fill lines may reach into one more.
  if (bytes % 64 != 0) __builtin_prefetch(begin + bytes - 1, kWrite, kLocality);
}

}  // namespace
}  // namespace PENSTOCK_ISA
}  // namespace penstock
