// A recorded forward: kernel calls with fixed pointers, replayed for any number of rows.
#pragma once
#include <memory>
#include <variant>
#include <vector>

#include "pool.h"

namespace sterna {

using Args = std::variant<EmbedArgs, NormArgs, LinearArgs, ActivateArgs, SelectArgs, RopeArgs,
                          AttentionArgs>;

void call(const KernelTable& table, const Args& args, const Step& step, const Worker& worker);

// Owns the calls, not the memory they point to: the recorder keeps that alive.
class Tape {
 public:
  void add(const Args& args) { calls_.push_back(args); }
  size_t size() const { return calls_.size(); }
  // One step: every call in order on every thread of the pool, a barrier after each.
  void run(Pool& pool, const KernelTable& table, const Step& step);
  // Seconds spent in each call (thread 0, barrier included) of one step.
  std::vector<double> profile(Pool& pool, const KernelTable& table, const Step& step);
  const char* name(size_t i) const;

 private:
  std::vector<Args> calls_;
  std::unique_ptr<std::atomic<int>[]> counters_;
  size_t num_counters_ = 0;
  void reset_counters();
};

}  // namespace sterna
