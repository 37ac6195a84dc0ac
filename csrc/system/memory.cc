// mmap, huge pages, release.
#include "system/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace penstock {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

Region::~Region() {
  bound(committed_);  // these addresses will be others' memory
  if (data_ != nullptr) munmap(data_, reserved_);
}

Region::Region(Region&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      reserved_(std::exchange(other.reserved_, 0)),
      committed_(std::exchange(other.committed_, 0)),
      unit_(other.unit_) {}

Region& Region::operator=(Region&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(reserved_, other.reserved_);
  std::swap(committed_, other.committed_);
  std::swap(unit_, other.unit_);
  return *this;
}

bool Region::reserve(size_t bytes) {
  const size_t unit = bytes < kHugePage ? static_cast<size_t>(sysconf(_SC_PAGESIZE)) : kHugePage;
  const size_t size = round_up(std::max<size_t>(bytes, 1), unit);
  // Over-reserve by one unit, cut to alignment: huge pages need an aligned start.
  void* raw = mmap(nullptr, size + unit, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return false;
  char* const start = static_cast<char*>(raw);
  char* const aligned = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(start), unit));
  if (aligned != start) munmap(start, aligned - start);
  const size_t tail = start + size + unit - (aligned + size);
  if (tail != 0) munmap(aligned + size, tail);
  Region fresh;
  fresh.data_ = aligned;
  fresh.reserved_ = size;
  fresh.unit_ = unit;
  *this = std::move(fresh);
  return true;
}

bool Region::commit(size_t bytes) {
  if (bytes <= committed_) {
    bound(bytes);
    return true;
  }
  if (bytes > reserved_) return false;
  const size_t target = std::min(reserved_, round_up(std::max(bytes, committed_ + committed_ / 8), unit_));
  if (mprotect(data_ + committed_, target - committed_, PROT_READ | PROT_WRITE) != 0) return false;
#ifdef MADV_HUGEPAGE
  // Advice alone: where the system has no huge pages, small ones do.
  if (unit_ == kHugePage) madvise(data_ + committed_, target - committed_, MADV_HUGEPAGE);
#endif
  committed_ = target;
  bound(bytes);
  return true;
}

void Region::bound([[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(data_, bytes);
  ASAN_POISON_MEMORY_REGION(data_ + bytes, committed_ - bytes);
#endif
}

void Region::release(size_t begin, size_t end) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  begin = round_up(begin, page);
  end = std::min(end, committed_) / page * page;
  if (begin < end) madvise(data_ + begin, end - begin, MADV_DONTNEED);
}

void keep_freed_memory() {
#ifdef __GLIBC__
  constexpr int kKept = 512 << 20;
  mallopt(M_MMAP_THRESHOLD, kKept / 2);
  mallopt(M_TRIM_THRESHOLD, kKept);
#endif
}

size_t physical_memory_bytes() {
  return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace penstock
