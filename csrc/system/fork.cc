// Implementation of system/fork.h.
#include "system/fork.h"

#include <pthread.h>

#include <atomic>

namespace penstock {
namespace {

std::atomic<uint64_t> generation{0};

}  // namespace

struct ForkHandlers {
  std::mutex ring;  // guards `first` and the links
  ForkSafeMutex* first = nullptr;

  ForkHandlers() {
    pthread_atfork([] { get().before(); }, [] { get().after(); },
                   [] {
                     generation.fetch_add(1);
                     get().after();
                   });
  }

  // Never taken down: mutexes that are outlive it else, at the end of the process.
  static ForkHandlers& get() {
    static ForkHandlers* const handlers = new ForkHandlers;
    return *handlers;
  }

  template <typename Each>
  void each(const Each& call) {
    if (first == nullptr) return;
    ForkSafeMutex* one = first;
    do {
      call(one->mutex_);
      one = one->next_;
    } while (one != first);
  }

  void before() {
    ring.lock();
    each([](std::mutex& mutex) { mutex.lock(); });
  }
  void after() {
    each([](std::mutex& mutex) { mutex.unlock(); });
    ring.unlock();
  }

  void add(ForkSafeMutex* mutex) {
    const std::lock_guard<std::mutex> guard(ring);
    if (first != nullptr) {
      mutex->next_ = first;
      mutex->previous_ = first->previous_;
      first->previous_->next_ = mutex;
      first->previous_ = mutex;
    }
    first = mutex;
  }
  void remove(ForkSafeMutex* mutex) {
    const std::lock_guard<std::mutex> guard(ring);
    if (first == mutex) first = mutex->next_ == mutex ? nullptr : mutex->next_;
    mutex->previous_->next_ = mutex->next_;
    mutex->next_->previous_ = mutex->previous_;
  }
};

ForkSafeMutex::ForkSafeMutex() { ForkHandlers::get().add(this); }

ForkSafeMutex::~ForkSafeMutex() { ForkHandlers::get().remove(this); }

uint64_t fork_generation() { return generation.load(std::memory_order_relaxed); }

}  // namespace penstock
