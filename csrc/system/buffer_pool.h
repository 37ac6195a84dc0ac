// Output buffers that are used again: a fresh 50 MB array costs more page faults than the look-up that fills it.
#pragma once

#include <cstddef>
#include <map>
#include <memory>

#include "system/fork.h"
#include "system/memory.h"

namespace penstock {

// Lends regions by size; a region comes back when its last user is gone, from whichever thread.
class BufferPool : public std::enable_shared_from_this<BufferPool> {
 public:
  explicit BufferPool(size_t max_idle_bytes) : max_idle_bytes_(max_idle_bytes) {}

  struct Loan {
    std::shared_ptr<BufferPool> pool;
    Region region;
    ~Loan();
  };

  // A region of at least `bytes` bytes, contents undefined; null: no memory.
  std::unique_ptr<Loan> take(size_t bytes);

 private:
  void give_back(Region region) noexcept;

  const size_t max_idle_bytes_;
  ForkSafeMutex lock_;
  std::multimap<size_t, Region> idle_;
  size_t idle_bytes_ = 0;
};

}  // namespace penstock
