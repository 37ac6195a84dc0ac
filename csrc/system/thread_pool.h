// A fixed set of threads that share the tasks of one loop at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <thread>
#include <vector>

namespace penstock {

class ThreadPool {
 public:
  // num_threads >= 1 counts the caller's own; the others start with the first loop that has work for them.
  explicit ThreadPool(int num_threads) : num_threads_(num_threads) {}
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Calls body(task, thread) for every task in [0, num_tasks) and returns when all are done. Tasks are handed out in
  // order, each to whichever thread is free; thread is in [0, num_threads). One caller at a time. What a body throws ends
  // the loop: no task begins after it, those that had begun are done, and it is thrown here. In a child of a fork, which
  // has none of the threads, they are started anew. Throws std::system_error if a thread cannot be started.
  void run(int64_t num_tasks, const std::function<void(int64_t, int)>& body);

 private:
  void start();
  void stop();
  void work(int thread);
  void drain(int thread) noexcept;

  const int num_threads_;
  std::vector<std::thread> workers_;
  uint64_t started_in_ = 0;  // fork_generation() of the workers
  const std::function<void(int64_t, int)>* body_ = nullptr;
  int64_t num_tasks_ = 0;
  std::atomic<int64_t> next_task_{0};
  std::atomic<uint32_t> generation_{0};
  std::atomic<uint32_t> busy_{0};
  std::atomic<bool> stop_{false};
  std::atomic<bool> has_failed_{false};
  std::exception_ptr failure_;  // the first one
};

}  // namespace penstock
