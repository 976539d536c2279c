#include "tape.h"

#include <chrono>

namespace sterna {
namespace {

struct Caller {
  const KernelTable& table;
  const Step& step;
  const Worker& worker;
  void operator()(const EmbedArgs& a) const { table.embed(a, step, worker); }
  void operator()(const NormArgs& a) const { table.norm(a, step, worker); }
  void operator()(const LinearArgs& a) const { table.linear(a, step, worker); }
  void operator()(const ActivateArgs& a) const { table.activate(a, step, worker); }
  void operator()(const SelectArgs& a) const { table.select(a, step, worker); }
  void operator()(const RopeArgs& a) const { table.rope(a, step, worker); }
  void operator()(const AttentionArgs& a) const { table.attention(a, step, worker); }
};

constexpr const char* NAMES[] = {"embed", "norm", "linear", "activate", "select", "rope",
                                 "attention"};

}  // namespace

void call(const KernelTable& table, const Args& args, const Step& step, const Worker& worker) {
  std::visit(Caller{table, step, worker}, args);
}

const char* Tape::name(size_t i) const { return NAMES[calls_.at(i).index()]; }

void Tape::reset_counters() {
  if (num_counters_ != calls_.size()) {
    counters_.reset(new std::atomic<int>[calls_.size()]);
    num_counters_ = calls_.size();
  }
  for (size_t i = 0; i < num_counters_; ++i) counters_[i].store(0, std::memory_order_relaxed);
}

void Tape::run(Pool& pool, const KernelTable& table, const Step& step) {
  reset_counters();
  pool.run([&](int tid) {
    Worker worker{tid, pool.size(), nullptr, pool.scratch(tid)};
    for (size_t i = 0; i < calls_.size(); ++i) {
      worker.next = &counters_[i];
      call(table, calls_[i], step, worker);
      pool.meet();
    }
  });
}

std::vector<double> Tape::profile(Pool& pool, const KernelTable& table, const Step& step) {
  reset_counters();
  std::vector<double> seconds(calls_.size());
  pool.run([&](int tid) {
    Worker worker{tid, pool.size(), nullptr, pool.scratch(tid)};
    auto last = std::chrono::steady_clock::now();
    for (size_t i = 0; i < calls_.size(); ++i) {
      worker.next = &counters_[i];
      call(table, calls_[i], step, worker);
      pool.meet();
      auto now = std::chrono::steady_clock::now();
      if (tid == 0) seconds[i] = std::chrono::duration<double>(now - last).count();
      last = now;
    }
  });
  return seconds;
}

}  // namespace sterna
