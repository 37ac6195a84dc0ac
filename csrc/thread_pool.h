// A fixed set of threads that share the tasks of one loop at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace penstock {

class ThreadPool {
 public:
  // num_threads >= 1 counts the caller's own.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(task, thread) for every task in [0, num_tasks) and returns when all are done. Tasks are handed out in
  // order, each to whichever thread is free; thread is in [0, num_threads). One caller at a time; body must not throw.
  void run(int64_t num_tasks, const std::function<void(int64_t, int)>& body);

 private:
  void work(int thread);
  void drain(int thread);

  std::vector<std::thread> workers_;
  const std::function<void(int64_t, int)>* body_ = nullptr;
  int64_t num_tasks_ = 0;
  std::atomic<int64_t> next_task_{0};
  std::atomic<uint32_t> generation_{0};
  std::atomic<uint32_t> busy_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace penstock
