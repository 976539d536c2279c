#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sterna {
namespace {

constexpr int SPINS = 2000;        // about 50 us: longer than any unit but a preempted one
constexpr int IDLE_SPINS = 20000;  // about 0.5 ms: longer than the Python between two steps

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class F>
void wait_until(F is_true) {
  for (int spins = 0; !is_true(); ++spins) spins < SPINS ? relax() : std::this_thread::yield();
}

// First unit of a thread's share; shares differ by at most one unit.
int share(int units, int tid, int threads) {
  return int((int64_t(units) * tid + threads - 1) / threads);
}

}  // namespace

Pool::Pool(int num_threads) : num_threads_(num_threads) {
  for (int i = 0; i < num_threads; ++i) scratch_.emplace_back(new char[SCRATCH_BYTES]);
  for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { loop(i); });
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(sleeping_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Pool::open(const Job& job) {
  if (job.num_stages > stages_allocated_) {
    stages_allocated_ = job.num_stages;
    next_.reset(new Counter[size_t(stages_allocated_) * num_threads_]);
    done_.reset(new Counter[stages_allocated_]);
  }
  for (int i = 0; i < job.num_stages * num_threads_; ++i)
    next_[i].value.store(0, std::memory_order_relaxed);
  for (int i = 0; i < job.num_stages; ++i) done_[i].value.store(0, std::memory_order_relaxed);
  current_.value.store(0, std::memory_order_relaxed);
  job_ = &job;
  {
    std::lock_guard<std::mutex> lock(sleeping_);
    state_.fetch_add(1, std::memory_order_seq_cst);
  }
  wake_.notify_all();
}

// No worker enters once the state is even; those inside leave, since every stage is done.
void Pool::close() {
  state_.fetch_add(1, std::memory_order_seq_cst);
  wait_until([&] { return inside_.value.load(std::memory_order_seq_cst) == 0; });
  job_ = nullptr;
}

void Pool::run(const Job& job) {
  std::lock_guard<std::mutex> one(running_);
  open(job);
  work(0, 0);
  close();
}

int Pool::do_stage(int tid, int stage, int units) {
  int mine = 0;
  Worker worker{scratch_[tid].get()};
  for (int v = 0; v < num_threads_; ++v) {
    int owner = (tid + v) % num_threads_;
    int begin = share(units, owner, num_threads_), end = share(units, owner + 1, num_threads_);
    if (begin == end) continue;
    std::atomic<int>& taken = next(stage, owner).value;
    for (int u; (u = begin + taken.fetch_add(1, std::memory_order_relaxed)) < end; ++mine)
      job_->run(stage, u, worker);
  }
  return mine;
}

void Pool::work(int tid, int first_stage) {
  for (int stage = first_stage; stage < job_->num_stages; ++stage) {
    int units = job_->units(stage);
    std::atomic<int>& done = done_[stage].value;
    if (int mine = do_stage(tid, stage, units)) done.fetch_add(mine, std::memory_order_release);
    wait_until([&] { return done.load(std::memory_order_acquire) >= units; });
    if (tid) continue;
    current_.value.store(stage + 1, std::memory_order_release);
    if (job_->on_done) job_->on_done(stage);
  }
}

void Pool::loop(int tid) {
  unsigned seen = 0;  // the last state whose job this thread has worked on
  auto is_new = [&] {
    unsigned state = state_.load(std::memory_order_seq_cst);
    return stop_.load() || (state % 2 == 1 && state != seen);
  };
  for (;;) {
    for (int spins = 0; spins < IDLE_SPINS && !is_new(); ++spins) relax();
    if (!is_new()) {
      std::unique_lock<std::mutex> lock(sleeping_);
      wake_.wait(lock, is_new);
    }
    if (stop_) return;
    inside_.value.fetch_add(1, std::memory_order_seq_cst);
    unsigned state = state_.load(std::memory_order_seq_cst);
    if (state % 2 == 1) {
      seen = state;
      work(tid, current_.value.load(std::memory_order_acquire));
    }
    inside_.value.fetch_sub(1, std::memory_order_seq_cst);
  }
}

}  // namespace sterna
