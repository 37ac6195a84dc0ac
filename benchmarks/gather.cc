// A bare gather: rows of floats by number, prefetched, into an output that is written around the caches. Nothing can look
// rows up faster than the machine does this.
#include <immintrin.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

void gather_part(const float* rows, int64_t dim, const uint32_t* numbers, int64_t first, int64_t last, float* out) {
  constexpr int64_t kAhead = 16;
  const auto prefetch = [&](int64_t i) __attribute__((always_inline)) {
    for (int64_t column = 0; column < dim; column += 16) __builtin_prefetch(rows + numbers[i] * dim + column);
  };
  for (int64_t i = first; i < last && i < first + kAhead; ++i) prefetch(i);
  for (int64_t i = first; i < last; ++i) {
    if (i + kAhead < last) prefetch(i + kAhead);
    const float* const row = rows + numbers[i] * dim;
    for (int64_t column = 0; column < dim; column += 4) {
      _mm_stream_ps(out + i * dim + column, _mm_loadu_ps(row + column));
    }
  }
  _mm_sfence();
}

}  // namespace

extern "C" {

// Zeroed floats on 2 MiB pages, where the system has them; null: no memory.
float* allocate(int64_t count) {
  void* const data = mmap(nullptr, count * sizeof(float), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return nullptr;
  madvise(data, count * sizeof(float), MADV_HUGEPAGE);
  std::memset(data, 0, count * sizeof(float));
  return static_cast<float*>(data);
}

void release(float* data, int64_t count) { munmap(data, count * sizeof(float)); }

// rows [*, dim], dim a multiple of 16; out [count, dim], 16-byte aligned.
void gather(const float* rows, int64_t dim, const uint32_t* numbers, int64_t count, int64_t num_threads, float* out) {
  std::vector<std::thread> threads;
  for (int64_t t = 1; t < num_threads; ++t) {
    threads.emplace_back(gather_part, rows, dim, numbers, count * t / num_threads, count * (t + 1) / num_threads, out);
  }
  gather_part(rows, dim, numbers, 0, count / num_threads, out);
  for (std::thread& thread : threads) thread.join();
}

}  // extern "C"
