// A recorded forward: kernel calls with fixed pointers, replayed for any number of rows.
#pragma once
#include <variant>
#include <vector>

#include "pool.h"

namespace sterna {

using Args = std::variant<EmbedArgs, NormArgs, LinearArgs, ActivateArgs, SelectArgs, RopeArgs,
                          StoreArgs, AttentionArgs, AttentionGradArgs, DrawArgs, ScoreArgs, QuantLinearArgs,
                          QuantEmbedArgs, QuantRowsArgs, EmbedNormArgs, BidirectionalArgs, PoolArgs,
                          DraftCellArgs, PickArgs, LoraDownArgs, LoraUpArgs, ScoreGradArgs,
                          GatedGradArgs, PackArgs>;

// Owns the calls, not the memory they point to: the recorder keeps that alive.
class Tape {
 public:
  void add(const Args& args) { calls_.push_back(args); }
  size_t size() const { return calls_.size(); }
  // One step: every call in order. `seconds`, when given, gets the time of each.
  void run(Pool& pool, const KernelTable& table, const Step& step,
           std::vector<double>* seconds = nullptr) const;
  const char* name(size_t i) const;

 private:
  std::vector<Args> calls_;
};

}  // namespace sterna
