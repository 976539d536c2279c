#include "sample.h"

#include <cmath>

namespace sterna {
namespace {

constexpr int LANES = 16;  // independent maxima, so that the loop vectorises

// Largest logit and its lowest index. A NaN never wins a comparison, so it is counted apart.
void argmax(const float* x, int n, int32_t* id, float* best, int* has_nan) {
  float lane_best[LANES];
  int32_t nan_lane[LANES] = {};
  for (int l = 0; l < LANES; ++l) lane_best[l] = -INFINITY;
  int i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int l = 0; l < LANES; ++l) {
      float v = x[i + l];
      lane_best[l] = v > lane_best[l] ? v : lane_best[l];
      nan_lane[l] |= v != v;
    }
  *best = -INFINITY;
  *has_nan = 0;
  for (int l = 0; l < LANES; ++l) {
    *best = lane_best[l] > *best ? lane_best[l] : *best;
    *has_nan |= nan_lane[l];
  }
  for (; i < n; ++i) {
    *best = x[i] > *best ? x[i] : *best;
    *has_nan |= x[i] != x[i];
  }
  *id = 0;
  for (int j = 0; j < n; ++j)
    if (x[j] == *best) {
      *id = j;
      return;
    }
}

float log_sum_exp(const float* x, int n, float best) {
  double lanes[LANES] = {};
  int i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int l = 0; l < LANES; ++l) lanes[l] += std::exp(x[i + l] - best);
  for (; i < n; ++i) lanes[0] += std::exp(x[i] - best);
  double total = 0;
  for (double lane : lanes) total += lane;
  return best + float(std::log(total));
}

}  // namespace

void sample_row(const SampleArgs& a, int r) {
  const float* x = a.logits + int64_t(r) * a.vocab;
  float best;
  int has_nan;
  argmax(x, a.vocab, &a.ids[r], &best, &has_nan);
  a.flags[r] = has_nan || !std::isfinite(best);
  if (a.logprobs) a.logprobs[r] = a.flags[r] ? NAN : best - log_sum_exp(x, a.vocab, best);
}

}  // namespace sterna
