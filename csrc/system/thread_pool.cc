// Spin briefly, then sleep.
#include "system/thread_pool.h"

#include <utility>

#include "system/fork.h"

namespace penstock {
namespace {

// About 20 microseconds: longer than the gap between two loops of one call, shorter than a time slice of the caller's own
// threads, which want the cores between calls.
constexpr int kSpins = 2000;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Forgets threads that a fork left behind: they can be neither joined nor detached, nor may their handles be destroyed.
void forget(std::vector<std::thread>& workers) {
  new std::vector<std::thread>(std::move(workers));
  workers.clear();
}

}  // namespace

ThreadPool::~ThreadPool() {
  if (started_in_ != fork_generation()) {
    if (!workers_.empty()) forget(workers_);
  } else {
    stop();
  }
}

void ThreadPool::start() {
  if (!workers_.empty()) forget(workers_);
  started_in_ = fork_generation();
  generation_.store(0);
  workers_.reserve(static_cast<size_t>(num_threads_) - 1);
  try {
    for (int thread = 1; thread < num_threads_; ++thread) workers_.emplace_back([this, thread] { work(thread); });
  } catch (...) {  // no memory, or no more threads
    stop();
    throw;
  }
}

void ThreadPool::stop() {
  stop_.store(true);
  generation_.fetch_add(1);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
  stop_.store(false);
}

void ThreadPool::drain(int thread) noexcept {
  try {
    for (;;) {
      const int64_t task = next_task_.fetch_add(1, std::memory_order_relaxed);
      if (task >= num_tasks_) return;
      (*body_)(task, thread);
    }
  } catch (...) {
    next_task_.store(num_tasks_, std::memory_order_relaxed);
    if (!has_failed_.exchange(true)) failure_ = std::current_exception();
  }
}

void ThreadPool::run(int64_t num_tasks, const std::function<void(int64_t, int)>& body) {
  if (num_tasks <= 0) return;
  if (num_threads_ == 1 || num_tasks == 1) {
    for (int64_t task = 0; task < num_tasks; ++task) body(task, 0);
    return;
  }
  if (workers_.empty() || started_in_ != fork_generation()) start();
  body_ = &body;
  num_tasks_ = num_tasks;
  next_task_.store(0, std::memory_order_relaxed);
  busy_.store(static_cast<uint32_t>(workers_.size()), std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  drain(0);
  for (int spin = 0; spin < kSpins && busy_.load(std::memory_order_acquire) != 0; ++spin) relax();
  for (uint32_t left; (left = busy_.load(std::memory_order_acquire)) != 0;) busy_.wait(left);
  if (has_failed_.load(std::memory_order_relaxed)) {
    has_failed_.store(false);
    std::rethrow_exception(std::exchange(failure_, nullptr));
  }
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spin) relax();
    generation_.wait(seen, std::memory_order_acquire);
    // Exactly one step: run() returns only when every worker has finished, so no generation is skipped.
    ++seen;
    if (stop_.load()) return;
    drain(thread);
    if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
  }
}

}  // namespace penstock
