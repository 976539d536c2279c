// Threads that stay, and work that any of them may take.
//
// A job is a list of stages, each a number of independent units. A thread takes units of its own
// share first (long streams of memory), then those that others have not begun; a stage ends when
// all its units are done, not when all threads have met. So a thread that the system has put
// aside, or that is still waking up, delays nobody unless it holds a unit. On a machine whose
// cores the HTTP server shares, a barrier of all threads cost up to 0.7 ms a call.
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

struct Job {
  int num_stages;
  std::function<int(int stage)> units;
  std::function<void(int stage, int unit, const Worker&)> run;
  std::function<void(int stage)> on_done;  // called by the caller's thread; may be empty
};

class Pool {
 public:
  explicit Pool(int num_threads);
  ~Pool();
  int size() const { return num_threads_; }
  // Does the whole job and returns. One job at a time: a second caller waits.
  void run(const Job& job);

 private:
  struct alignas(64) Counter {
    std::atomic<int> value{0};
  };
  void loop(int tid);
  void work(int tid, int first_stage);
  int do_stage(int tid, int stage, int units);
  void open(const Job& job);
  void close();
  Counter& next(int stage, int tid) { return next_[stage * num_threads_ + tid]; }

  int num_threads_;
  std::vector<std::unique_ptr<char[]>> scratch_;
  std::vector<std::thread> threads_;
  // The open job. `state_` is odd while a job is open; workers enter only then.
  const Job* job_ = nullptr;
  std::unique_ptr<Counter[]> next_, done_;
  int stages_allocated_ = 0;
  Counter current_, inside_;
  alignas(64) std::atomic<unsigned> state_{0};
  std::atomic<bool> stop_{false};
  std::mutex running_, sleeping_;
  std::condition_variable wake_;
};

}  // namespace sterna
