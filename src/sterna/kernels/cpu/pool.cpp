#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sterna {
namespace {

constexpr int SPINS = 4000;         // about 100 us: longer than any balanced kernel's skew
constexpr int IDLE_SPINS = 20000;   // about 0.5 ms: longer than the Python between two steps

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void Barrier::wait() {
  if (size_ == 1) return;
  int generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins)
    spins < SPINS ? relax() : std::this_thread::yield();
}

Pool::Pool(int num_threads) : num_threads_(num_threads) {
  barrier_.reset(num_threads);
  for (int i = 0; i < num_threads; ++i) scratch_.emplace_back(new char[SCRATCH_BYTES + 64]);
  for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { loop(i); });
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(sleeping_);
    stop_ = true;
    epoch_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Pool::run(const std::function<void(int)>& body) {
  std::lock_guard<std::mutex> one(running_);
  if (num_threads_ == 1) return body(0);
  body_ = &body;
  done_.store(0, std::memory_order_relaxed);
  {
    std::lock_guard<std::mutex> lock(sleeping_);
    epoch_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  body(0);
  for (int spins = 0; done_.load(std::memory_order_acquire) != num_threads_ - 1; ++spins)
    spins < SPINS ? relax() : std::this_thread::yield();
}

void Pool::loop(int tid) {
  int seen = 0;
  for (;;) {
    int spins = 0;
    while (epoch_.load(std::memory_order_acquire) == seen && spins < IDLE_SPINS) {
      relax();
      ++spins;
    }
    if (epoch_.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> lock(sleeping_);
      wake_.wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
    }
    seen = epoch_.load(std::memory_order_acquire);
    if (stop_) return;
    (*body_)(tid);
    done_.fetch_add(1, std::memory_order_release);
  }
}

}  // namespace sterna
