#include "tape.h"

#include <chrono>

namespace sterna {
namespace {

// The kernel of an argument struct, by overload.
const auto& kernel(const KernelTable& t, const EmbedArgs&) { return t.embed; }
const auto& kernel(const KernelTable& t, const NormArgs&) { return t.norm; }
const auto& kernel(const KernelTable& t, const LinearArgs&) { return t.linear; }
const auto& kernel(const KernelTable& t, const ActivateArgs&) { return t.activate; }
const auto& kernel(const KernelTable& t, const SelectArgs&) { return t.select; }
const auto& kernel(const KernelTable& t, const RopeArgs&) { return t.rope; }
const auto& kernel(const KernelTable& t, const StoreArgs&) { return t.store; }
const auto& kernel(const KernelTable& t, const AttentionArgs&) { return t.attention; }
const auto& kernel(const KernelTable& t, const AttentionGradArgs&) { return t.attention_grad; }
const auto& kernel(const KernelTable& t, const DrawArgs&) { return t.draw; }
const auto& kernel(const KernelTable& t, const ScoreArgs&) { return t.score; }
const auto& kernel(const KernelTable& t, const QuantLinearArgs&) { return t.quant_linear; }
const auto& kernel(const KernelTable& t, const QuantEmbedArgs&) { return t.quant_embed; }
const auto& kernel(const KernelTable& t, const QuantRowsArgs&) { return t.quant_rows; }
const auto& kernel(const KernelTable& t, const EmbedNormArgs&) { return t.embed_norm; }
const auto& kernel(const KernelTable& t, const BidirectionalArgs&) { return t.bidirectional; }
const auto& kernel(const KernelTable& t, const PoolArgs&) { return t.pool; }
const auto& kernel(const KernelTable& t, const DraftCellArgs&) { return t.draft_cell; }
const auto& kernel(const KernelTable& t, const PickArgs&) { return t.pick; }
const auto& kernel(const KernelTable& t, const LoraDownArgs&) { return t.lora_down; }
const auto& kernel(const KernelTable& t, const LoraUpArgs&) { return t.lora_up; }
const auto& kernel(const KernelTable& t, const ScoreGradArgs&) { return t.score_grad; }
const auto& kernel(const KernelTable& t, const GatedGradArgs&) { return t.gated_grad; }
const auto& kernel(const KernelTable& t, const PackArgs&) { return t.pack; }

constexpr const char* NAMES[] = {"embed", "norm", "linear", "activate", "select", "rope",
                                 "store", "attention", "attention_grad", "draw", "score", "quant_linear", "quant_embed",
                                 "quant_rows", "embed_norm", "bidirectional", "pool", "draft_cell", "pick",
                                 "lora_down", "lora_up", "score_grad", "gated_grad", "pack"};

}  // namespace

const char* Tape::name(size_t i) const { return NAMES[calls_.at(i).index()]; }

void Tape::run(Pool& pool, const KernelTable& table, const Step& step,
               std::vector<double>* seconds) const {
  Job job;
  job.num_stages = int(calls_.size());
  job.units = [&](int stage) {
    return std::visit([&](const auto& a) { return kernel(table, a).units(a, step); },
                      calls_[stage]);
  };
  job.run = [&](int stage, int unit, const Worker& worker) {
    std::visit([&](const auto& a) { kernel(table, a).run(a, step, worker, unit); },
               calls_[stage]);
  };
  auto last = std::chrono::steady_clock::now();
  if (seconds) job.on_done = [&](int) {
    auto now = std::chrono::steady_clock::now();
    seconds->push_back(std::chrono::duration<double>(now - last).count());
    last = now;
  };
  pool.run(job);
}

}  // namespace sterna
