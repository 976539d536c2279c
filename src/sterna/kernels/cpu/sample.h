// The greedy sampler: most probable token and its log-probability, one pass over the logits.
#pragma once
#include <cstdint>

namespace sterna {

struct SampleArgs {
  const float* logits;  // [rows, vocab]
  int32_t* ids;         // [rows]  argmax; the lowest id wins a tie
  float* logprobs;      // [rows]  log softmax at ids; null = not wanted
  int32_t* flags;       // [rows]  1 when the row has a NaN or no finite logit
  int32_t vocab;
};

void sample_row(const SampleArgs& args, int row);

}  // namespace sterna
