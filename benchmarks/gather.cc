// What the machine can do, without anything to compute: rows of floats by number, prefetched, into an output that is
// written around the caches. With the rows' places known (gather); with each row's place read from a line of another array
// first (two_lines), the limit of any look-up whose index lies outside the rows; and with a key to read in front of each row,
// the places known (key_and_row), the limit of one whose keys lie with the rows and which never looks in a wrong place.
#include <immintrin.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kAhead = 16;

[[gnu::always_inline]] inline void prefetch_row(const float* row, int64_t dim) {
  for (int64_t column = 0; column < dim; column += 16) __builtin_prefetch(row + column);
}

[[gnu::always_inline]] inline void stream_row(const float* row, int64_t dim, float* out) {
  for (int64_t column = 0; column < dim; column += 4) _mm_stream_ps(out + column, _mm_loadu_ps(row + column));
}

void gather_part(const float* rows, int64_t dim, const uint32_t* numbers, int64_t first, int64_t last, float* out) {
  for (int64_t i = first; i < last && i < first + kAhead; ++i) prefetch_row(rows + numbers[i] * dim, dim);
  for (int64_t i = first; i < last; ++i) {
    if (i + kAhead < last) prefetch_row(rows + numbers[i + kAhead] * dim, dim);
    stream_row(rows + numbers[i] * dim, dim, out + i * dim);
  }
  _mm_sfence();
}

// Three steps of one key are kAhead keys apart: its line of the index, its row, its output.
void two_lines_part(const float* rows, int64_t dim, const uint32_t* index, const uint32_t* lines, const uint32_t* numbers,
                    int64_t first, int64_t last, float* out) {
  uint32_t places[kAhead] = {};
  for (int64_t i = first; i < last + 2 * kAhead; ++i) {
    if (i < last) __builtin_prefetch(index + int64_t{lines[i]} * 16);
    const int64_t found = i - kAhead, done = found - kAhead;
    if (done >= first) stream_row(rows + int64_t{places[done % kAhead]} * dim, dim, out + done * dim);
    if (found >= first && found < last) {
      // The line holds zeros, which the compiler does not know: the place is not there before the line is.
      places[found % kAhead] = numbers[found] + index[int64_t{lines[found]} * 16];
      prefetch_row(rows + int64_t{places[found % kAhead]} * dim, dim);
    }
  }
  _mm_sfence();
}

void key_and_row_part(const float* entries, int64_t dim, const uint32_t* numbers, int64_t first, int64_t last, float* out) {
  for (int64_t i = first; i < last + kAhead; ++i) {
    if (i < last) {
      const float* const ahead = entries + numbers[i] * (dim + 2);
      prefetch_row(ahead, dim);
      __builtin_prefetch(ahead + dim + 1);
    }
    if (i < first + kAhead) continue;
    const float* const entry = entries + numbers[i - kAhead] * (dim + 2);
    // A key of zero, which the compiler does not know.
    int64_t key;
    std::memcpy(&key, entry, sizeof(key));
    stream_row(entry + 2 + key, dim, out + (i - kAhead) * dim);
  }
  _mm_sfence();
}

// Calls part(first, last) for equal parts of [0, count), each on a thread.
template <typename Part>
void in_threads(int64_t count, int64_t num_threads, const Part& part) {
  std::vector<std::thread> threads;
  for (int64_t t = 1; t < num_threads; ++t) {
    threads.emplace_back(part, count * t / num_threads, count * (t + 1) / num_threads);
  }
  part(int64_t{0}, count / num_threads);
  for (std::thread& thread : threads) thread.join();
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
  in_threads(count, num_threads, [=](int64_t first, int64_t last) { gather_part(rows, dim, numbers, first, last, out); });
}

// The same from rows whose places are learnt from index [*, 16], of zeros: row i's from line lines[i].
void two_lines(const float* rows, int64_t dim, const uint32_t* index, const uint32_t* lines, const uint32_t* numbers,
               int64_t count, int64_t num_threads, float* out) {
  in_threads(count, num_threads, [=](int64_t first, int64_t last) {
    two_lines_part(rows, dim, index, lines, numbers, first, last, out);
  });
}

// Rows of entries [*, 2 + dim], of zeros, each with a key of two floats' size in front.
void key_and_row(const float* entries, int64_t dim, const uint32_t* numbers, int64_t count, int64_t num_threads, float* out) {
  in_threads(count, num_threads, [=](int64_t first, int64_t last) { key_and_row_part(entries, dim, numbers, first, last, out); });
}

}  // extern "C"
