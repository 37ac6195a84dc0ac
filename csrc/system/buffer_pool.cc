// Implementation of system/buffer_pool.h.
#include "system/buffer_pool.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <utility>

namespace penstock {
namespace {

constexpr size_t kLeastBytes = 4096;

}  // namespace

BufferPool::Loan::~Loan() { pool->give_back(std::move(region)); }

std::unique_ptr<BufferPool::Loan> BufferPool::take(size_t bytes) {
  Region region;
  {
    const std::lock_guard<ForkSafeMutex> guard(lock_);
    // Up to twice the size wanted: batches of unequal size share regions, a small one does not pin a huge one.
    const auto it = idle_.lower_bound(bytes);
    if (it != idle_.end() && it->first <= 2 * std::max(bytes, kLeastBytes)) {
      idle_bytes_ -= it->first;
      region = std::move(it->second);
      idle_.erase(it);
    }
  }
  if (region.data() == nullptr && !region.reserve(bytes)) return nullptr;
  if (!region.commit(bytes)) return nullptr;
  return std::unique_ptr<Loan>(new Loan{shared_from_this(), std::move(region)});
}

void BufferPool::give_back(Region region) noexcept {
  const std::lock_guard<ForkSafeMutex> guard(lock_);
  if (idle_bytes_ + region.committed() > max_idle_bytes_) return;
  const size_t size = region.committed();
  try {
    idle_.emplace(size, std::move(region));
    idle_bytes_ += size;
  } catch (const std::bad_alloc&) {
    // Then it goes back to the system.
  }
}

}  // namespace penstock
