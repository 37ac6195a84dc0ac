// Address ranges that are reserved once and filled from the front, so that rows never move while a store grows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace penstock {

// A reserved range of zeroed memory; for 2 MiB and more, pages of that size are asked for. Not thread-safe.
class Region {
 public:
  Region() = default;
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  Region(Region&& other) noexcept;
  Region& operator=(Region&& other) noexcept;

  // Reserves addresses, no memory. False: the system refuses (address-space limit).
  bool reserve(size_t bytes);

  // Makes the first `bytes` bytes usable; what is there stays. False: out of memory or beyond the reserve. What lies behind
  // them is out of bounds, though memory it may be: the address sanitizer sees to it.
  bool commit(size_t bytes);

  // Gives the memory of [begin, end) back to the system; it reads as zero afterwards.
  void release(size_t begin, size_t end);

  char* data() const { return data_; }
  size_t reserved() const { return reserved_; }
  size_t committed() const { return committed_; }

 private:
  // To the address sanitizer the first `bytes` bytes are all that may be touched; else nothing happens.
  void bound(size_t bytes);

  char* data_ = nullptr;
  size_t reserved_ = 0;
  size_t committed_ = 0;
  size_t unit_ = 1;  // of both
};

// Keeps what `malloc` frees for later calls of this process, up to half a gigabyte, rather than give it back to the system
// at once: a tensor of some megabytes in every step otherwise costs the page faults of all of them. Where the C library
// knows how; elsewhere nothing.
void keep_freed_memory();

// Makes a vector at least so long; it grows by half at least.
template <typename T>
void ensure_size(std::vector<T>& v, size_t size) {
  if (v.size() < size) v.resize(std::max(size, v.size() + v.size() / 2));
}

// Bytes of physical memory of this machine.
size_t physical_memory_bytes();

}  // namespace penstock
