// Threads that stay: workers spin between the calls of a step, and sleep when no step comes.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "args.h"

namespace sterna {

// All threads meet here. Spinning: a barrier of two running threads costs about 0.1 us; after
// SPINS rounds a thread yields, so that a descheduled partner (busy machine) gets its core.
class Barrier {
 public:
  void reset(int num_threads) { size_ = num_threads; }
  void wait();

 private:
  int size_ = 1;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
};

class Pool {
 public:
  explicit Pool(int num_threads);
  ~Pool();
  int size() const { return num_threads_; }
  // Runs body(tid) on every thread, the caller's among them, and returns when all are done.
  // One run at a time: a second caller waits.
  void run(const std::function<void(int)>& body);
  void meet() { barrier_.wait(); }
  char* scratch(int tid) { return scratch_[tid].get(); }

 private:
  void loop(int tid);
  int num_threads_;
  Barrier barrier_;
  std::mutex running_, sleeping_;
  std::condition_variable wake_;
  std::atomic<int> epoch_{0}, done_{0};
  std::atomic<bool> stop_{false};
  const std::function<void(int)>* body_ = nullptr;
  std::vector<std::thread> threads_;
  std::vector<std::unique_ptr<char[]>> scratch_;
};

}  // namespace sterna
