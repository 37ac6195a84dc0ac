// Output buffers that are used again: a fresh 50 MB array costs more page faults than the look-up that fills it.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>

#include "memory.h"

namespace penstock {

// Lends regions by size; a region comes back when its last user is gone, from whichever thread. Keeps at most
// `kMaxIdleBytes` of idle ones.
class BufferPool : public std::enable_shared_from_this<BufferPool> {
 public:
  struct Loan {
    std::shared_ptr<BufferPool> pool;
    Region region;
    ~Loan();
  };

  // A region of at least `bytes` bytes, 2 MiB aligned, contents undefined; null: no memory.
  std::unique_ptr<Loan> take(size_t bytes);

 private:
  static constexpr size_t kMaxIdleBytes = size_t{1} << 30;

  void give_back(Region region);

  std::mutex lock_;
  std::multimap<size_t, Region> idle_;
  size_t idle_bytes_ = 0;
};

}  // namespace penstock
