// What a process that forks must see to: a child has one thread, the one that forked, and memory as it was at that moment.
#pragma once

#include <cstdint>
#include <mutex>

namespace penstock {

// A mutex that no other thread holds while the process forks: the fork waits for them. So a child finds it free, and what it
// guards whole. A thread that holds one takes no other, and waits for nothing that the forking thread may hold.
class ForkSafeMutex {
 public:
  ForkSafeMutex();
  ~ForkSafeMutex();
  ForkSafeMutex(const ForkSafeMutex&) = delete;
  ForkSafeMutex& operator=(const ForkSafeMutex&) = delete;

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  friend struct ForkHandlers;

  std::mutex mutex_;
  // All of them are in one ring.
  ForkSafeMutex* next_ = this;
  ForkSafeMutex* previous_ = this;
};

// Differs from the parent's in every child: threads that were started under another one are not there.
uint64_t fork_generation();

}  // namespace penstock
