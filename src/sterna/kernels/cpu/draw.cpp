// Draws a token from each row of logits: greedy, temperature, top_k, min_p, top_p; and says which
// probability the draw gives to a token.
//
// The order of the steps and the inverse-CDF draw in id order are those of engine/sampler.py, the
// reference. A row is worked on by one thread alone, so its token depends on nothing else.
#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace sterna {
namespace STERNA_ISA {
namespace {

constexpr int BLOCK = 64;  // sums and maxima are kept by blocks of this many tokens
constexpr float GREEDY_BELOW = 1e-5f;

// The survivors of a row: ids ascending, p their unnormalised probabilities (largest = 1).
struct Survivors {
  float* p;      // [count]
  int32_t* ids;  // [count]
  int count;
};

float row_max(const float* x, int n, bool* has_nan) {
  vf best = splat(-INFINITY);
  vi nan = {};
  int i = 0;
  for (; i + VW <= n; i += VW) {
    vf v = load(x + i);
    best = v > best ? v : best;
    nan |= (vi)(v != v);
  }
  float m = max_of(best);
  *has_nan = false;
  for (int j = 0; j < VW; ++j) *has_nan |= nan[j] != 0;
  for (; i < n; ++i) {
    *has_nan |= x[i] != x[i];
    m = x[i] > m ? x[i] : m;
  }
  return m;
}

void probabilities(const float* x, int n, float m, float temperature, float* p) {
  int i = 0;
  for (; i + VW <= n; i += VW) store(p + i, vexp((load(x + i) - splat(m)) / splat(temperature)));
  for (; i < n; ++i) {
    float lanes[VW];
    store(lanes, vexp(splat((x[i] - m) / temperature)));
    p[i] = lanes[0];
  }
}

double total(const float* p, int n) {
  double sum = 0;
  for (int b = 0; b < n; b += BLOCK) {
    float part = 0;
    for (int i = b; i < n && i < b + BLOCK; ++i) part += p[i];
    sum += part;
  }
  return sum;
}

// Keeps the elements that `keep(index)` accepts, in order.
template <class F>
void filter(Survivors& s, F keep) {
  int kept = 0;
  for (int i = 0; i < s.count; ++i)
    if (keep(i)) {
      s.p[kept] = s.p[i];
      s.ids[kept++] = s.ids[i];
    }
  s.count = kept;
}

// A value that at least `k` elements reach: the k-th largest of the block maxima.
float lower_bound_of_top(const Survivors& s, int k, float* maxima) {
  int blocks = s.count / BLOCK;
  if (2 * k >= blocks) return 0.f;
  for (int b = 0; b < blocks; ++b)
    maxima[b] = *std::max_element(s.p + b * BLOCK, s.p + (b + 1) * BLOCK);
  std::nth_element(maxima, maxima + (blocks - k), maxima + blocks);
  return maxima[blocks - k];
}

// Indices of the survivors that reach `bound`, most probable first, ties by id.
int by_probability(const Survivors& s, float bound, int32_t* order) {
  int n = 0;
  for (int i = 0; i < s.count; ++i)
    if (s.p[i] >= bound) order[n++] = i;
  std::sort(order, order + n,
            [&](int a, int b) { return s.p[a] > s.p[b] || (s.p[a] == s.p[b] && a < b); });
  return n;
}

void keep_first(Survivors& s, int32_t* order, int n) {
  std::sort(order, order + n);
  for (int i = 0; i < n; ++i) {
    s.p[i] = s.p[order[i]];
    s.ids[i] = s.ids[order[i]];
  }
  s.count = n;
}

void keep_top_k(Survivors& s, int k, float* maxima, int32_t* order) {
  int n = by_probability(s, lower_bound_of_top(s, k, maxima), order);
  keep_first(s, order, n < k ? n : k);
}

// The smallest set of largest probabilities that weighs at least top_p of the whole. Tokens below
// (1 - top_p) / count weigh less than 1 - top_p together, so they need no sorting.
void keep_nucleus(Survivors& s, float top_p, int32_t* order) {
  double sum = total(s.p, s.count), before = 0;
  int n = by_probability(s, float((1.0 - top_p) * sum / s.count * 0.999), order), kept = 0;
  while (kept < n && before < top_p * sum) before += s.p[order[kept++]];
  keep_first(s, order, kept ? kept : 1);
}

int invert_cdf(const Survivors& s, double uniform) {
  double point = uniform * total(s.p, s.count), before = 0;
  int last = -1;
  for (int b = 0; b < s.count; b += BLOCK) {
    int end = s.count < b + BLOCK ? s.count : b + BLOCK;
    double block = total(s.p + b, end - b);
    if (before + block > point || end == s.count) {
      for (int i = b; i < end; ++i) {
        if (s.p[i] > 0) last = i;
        before += s.p[i];
        if (before > point && s.p[i] > 0) return s.ids[i];
      }
    } else {
      before += block;
    }
  }
  while (last < 0 || s.p[last] == 0) last = last < 0 ? s.count - 1 : last - 1;
  return s.ids[last];
}

// What is left of row r of a distribution, in scratch memory. `m` is the row's maximum.
template <class A>
Survivors survivors(const A& a, int r, const float* x, float m, char* scratch) {
  float *p = reinterpret_cast<float*>(scratch), *maxima = p + a.vocab;
  int32_t* ids = reinterpret_cast<int32_t*>(maxima + a.vocab / BLOCK + 1);
  int32_t* order = ids + a.vocab;
  Survivors s{p, ids, a.vocab};
  probabilities(x, a.vocab, m, a.temperature[r], p);
  for (int i = 0; i < a.vocab; ++i) ids[i] = i;
  if (a.top_k[r] > 0 && a.top_k[r] < a.vocab) keep_top_k(s, a.top_k[r], maxima, order);
  if (a.min_p[r] > 0) filter(s, [&](int i) { return s.p[i] >= a.min_p[r]; });
  if (a.top_p[r] < 1) keep_nucleus(s, a.top_p[r], order);
  return s;
}

int draw_row(const DrawArgs& a, int r, char* scratch) {
  const float* x = a.logits + int64_t(a.row_ids[r]) * a.vocab;
  bool has_nan;
  float m = row_max(x, a.vocab, &has_nan);
  if (has_nan || !std::isfinite(m)) return -1;
  if (a.temperature[r] < GREEDY_BELOW) return int(std::find(x, x + a.vocab, m) - x);
  return invert_cdf(survivors(a, r, x, m, scratch), a.uniform[r]);
}

struct Sums {
  double p, p_log_p;  // sum of p, and of p log p, for unnormalised p
};

// One log a survivor would be slow, and log of a rounded exp is not its argument: z = (x - m) / t.
Sums sums(const Survivors& s, const float* x, float m, float temperature) {
  Sums found{0, 0};
  bool is_plain = s.ids[s.count - 1] == s.count - 1;  // nothing was dropped before the last
  for (int b = 0; b < s.count; b += BLOCK) {
    int end = s.count < b + BLOCK ? s.count : b + BLOCK, i = b;
    vf p{}, pz{};
    for (; is_plain && i + VW <= end; i += VW) {
      vf z = (load(x + i) - splat(m)) / splat(temperature), v = load(s.p + i);
      p += v;
      pz += v > splat(0.f) ? v * z : splat(0.f);  // 0 * -infinity
    }
    float p1 = sum(p), pz1 = sum(pz);
    for (; i < end; ++i) {
      p1 += s.p[i];
      if (s.p[i] > 0) pz1 += s.p[i] * ((x[s.ids[i]] - m) / temperature);
    }
    found.p += p1;
    found.p_log_p += pz1;
  }
  return found;
}

void score_row(const ScoreArgs& a, int r, char* scratch) {
  const float* x = a.logits + int64_t(a.row_ids[r]) * a.vocab;
  bool has_nan;
  float m = row_max(x, a.vocab, &has_nan);
  if (has_nan || !std::isfinite(m)) {
    a.logprobs[r] = a.entropies[r] = a.log_sums[r] = NAN;
    return;
  }
  Survivors s = survivors(a, r, x, m, scratch);
  Sums found = sums(s, x, m, a.temperature[r]);
  double log_sum = a.log_sums[r] = std::log(found.p);
  a.entropies[r] = log_sum - found.p_log_p / found.p;
  bool is_kept = std::binary_search(s.ids, s.ids + s.count, a.chosen[r]);
  float z = (x[a.chosen[r]] - m) / a.temperature[r];
  a.logprobs[r] = is_kept ? double(z) - log_sum : -INFINITY;
  if (!a.probs) return;
  float* out = a.probs + int64_t(a.row_ids[r]) * a.vocab;
  std::fill(out, out + a.vocab, 0.f);
  for (int i = 0; i < s.count; ++i) out[s.ids[i]] = float(s.p[i] / found.p);
}

}  // namespace

Kernel<DrawArgs> draw_kernel() {
  return {[](const DrawArgs&, const Step& step) { return step.num_rows[1]; },
          [](const DrawArgs& a, const Step&, const Worker& w, int unit) {
            a.ids[unit] = draw_row(a, unit, w.scratch);
          }};
}

Kernel<ScoreArgs> score_kernel() {
  return {[](const ScoreArgs&, const Step& step) { return step.num_rows[1]; },
          [](const ScoreArgs& a, const Step&, const Worker& w, int unit) {
            score_row(a, unit, w.scratch);
          }};
}

}  // namespace STERNA_ISA
}  // namespace sterna
