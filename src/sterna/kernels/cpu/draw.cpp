// Draws a token from each row of logits: greedy, temperature, top_k, min_p, top_p; and says which
// probability the draw gives to a token.
//
// The order of the steps and the inverse-CDF draw in id order are those of engine/sampler.py, the
// reference. A row is worked on by one thread alone, so its token depends on nothing else.
// Sums of 49k floats one after the other wait for each addition (50 us a pass): every sum is one of
// blocks, and a block's is a vector's. The row of a rollout costs four passes: maximum, exp, sum, CDF.
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
  int32_t* ids;  // [count]; null: all tokens
  int count;
  int id(int i) const { return ids ? ids[i] : i; }
  bool has(int token) const { return !ids || std::binary_search(ids, ids + count, token); }
};

float row_max(const float* x, int n, bool* has_nan) {
  vf best[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
  vi nan = {};
  int i = 0;
  for (; i + 4 * VW <= n; i += 4 * VW)
    for (int j = 0; j < 4; ++j) {
      vf v = load(x + i + j * VW);
      best[j] = v > best[j] ? v : best[j];
      nan |= (vi)(v != v);
    }
  float m = max_of(vmax(vmax(best[0], best[1]), vmax(best[2], best[3])));
  *has_nan = false;
  for (int j = 0; j < VW; ++j) *has_nan |= nan[j] != 0;
  for (; i < n; ++i) {
    *has_nan |= x[i] != x[i];
    m = x[i] > m ? x[i] : m;
  }
  return m;
}

// p = exp((x - m) / t); a division by 1 changes no bit, so there is none.
void probabilities(const float* x, int n, float m, float temperature, float* p) {
  int i = 0;
  if (temperature == 1.f)
    for (; i + VW <= n; i += VW) store(p + i, vexp(load(x + i) - splat(m)));
  for (; i + VW <= n; i += VW) store(p + i, vexp((load(x + i) - splat(m)) / splat(temperature)));
  for (; i < n; ++i) {
    float lanes[VW];
    store(lanes, vexp(splat((x[i] - m) / temperature)));
    p[i] = lanes[0];
  }
}

float block_sum(const float* p, int n) {
  vf part = {};
  int i = 0;
  for (; i + VW <= n; i += VW) part += load(p + i);
  float all = sum(part);
  for (; i < n; ++i) all += p[i];
  return all;
}

double total(const float* p, int n) {
  double all = 0;
  for (int b = 0; b < n; b += BLOCK) all += block_sum(p + b, n - b < BLOCK ? n - b : BLOCK);
  return all;
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

int invert_cdf(const Survivors& s, double all, double uniform) {
  double point = uniform * all, before = 0;
  int last = -1;
  for (int b = 0; b < s.count; b += BLOCK) {
    int end = s.count < b + BLOCK ? s.count : b + BLOCK;
    double block = block_sum(s.p + b, end - b);
    if (before + block > point || end == s.count) {
      for (int i = b; i < end; ++i) {
        if (s.p[i] > 0) last = i;
        before += s.p[i];
        if (before > point && s.p[i] > 0) return s.id(i);
      }
    } else {
      before += block;
    }
  }
  while (last < 0 || s.p[last] == 0) last = last < 0 ? s.count - 1 : last - 1;
  return s.id(last);
}

// What is left of row r of a distribution, in scratch memory. `m` is the row's maximum.
template <class A>
Survivors survivors(const A& a, int r, const float* x, float m, char* scratch) {
  float *p = reinterpret_cast<float*>(scratch), *maxima = p + a.vocab;
  int32_t* ids = reinterpret_cast<int32_t*>(maxima + a.vocab / BLOCK + 1);
  int32_t* order = ids + a.vocab;
  Survivors s{p, nullptr, a.vocab};
  probabilities(x, a.vocab, m, a.temperature[r], p);
  bool cuts_top = a.top_k[r] > 0 && a.top_k[r] < a.vocab;
  if (!cuts_top && a.min_p[r] <= 0 && a.top_p[r] >= 1) return s;
  s.ids = ids;
  for (int i = 0; i < a.vocab; ++i) ids[i] = i;
  if (cuts_top) keep_top_k(s, a.top_k[r], maxima, order);
  if (a.min_p[r] > 0) filter(s, [&](int i) { return s.p[i] >= a.min_p[r]; });
  if (a.top_p[r] < 1) keep_nucleus(s, a.top_p[r], order);
  return s;
}

// log p of a token with z = (x[token] - m) / t, where all = sum of exp over the survivors.
double logprob_of(const Survivors& s, int token, float z, double log_sum) {
  return s.has(token) ? double(z) - log_sum : -INFINITY;
}

int rank_of(const float* x, int n, float chosen) {
  vi larger = {};
  int i = 0, count = 1;
  for (; i + VW <= n; i += VW) larger -= (vi)(load(x + i) > splat(chosen));
  for (int j = 0; j < VW; ++j) count += larger[j];
  for (; i < n; ++i) count += x[i] > chosen;
  return count;
}

int draw_row(const DrawArgs& a, int r, char* scratch) {
  const float* x = a.logits + int64_t(a.row_ids[r]) * a.vocab;
  bool has_nan;
  float m = row_max(x, a.vocab, &has_nan), t = a.temperature[r];
  if (has_nan || !std::isfinite(m)) return -1;
  if (t < GREEDY_BELOW) return int(std::find(x, x + a.vocab, m) - x);
  Survivors s = survivors(a, r, x, m, scratch);
  double all = total(s.p, s.count);
  int token = invert_cdf(s, all, a.uniform[r]);
  if (a.logprobs) a.logprobs[r] = logprob_of(s, token, (x[token] - m) / t, std::log(all));
  if (a.ranks) a.ranks[r] = rank_of(x, a.vocab, x[token]);
  return token;
}

// Sum of p log p for unnormalised p. One log a survivor would be slow, and log of a rounded exp is
// not its argument: z = (x - m) / t.
double sum_p_log_p(const Survivors& s, const float* x, float m, float temperature) {
  double all = 0;
  bool is_plain = !s.ids || s.ids[s.count - 1] == s.count - 1;  // none dropped before the last
  for (int b = 0; b < s.count; b += BLOCK) {
    int end = s.count < b + BLOCK ? s.count : b + BLOCK, i = b;
    vf part = {};
    for (; is_plain && i + VW <= end; i += VW) {
      vf z = load(x + i) - splat(m), v = load(s.p + i);
      if (temperature != 1.f) z = z / splat(temperature);
      part += v > splat(0.f) ? v * z : splat(0.f);  // 0 * -infinity
    }
    float one = sum(part);
    for (; i < end; ++i)
      if (s.p[i] > 0) one += s.p[i] * ((x[s.id(i)] - m) / temperature);
    all += one;
  }
  return all;
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
  double all = total(s.p, s.count), log_sum = a.log_sums[r] = std::log(all);
  a.entropies[r] = log_sum - sum_p_log_p(s, x, m, a.temperature[r]) / all;
  float z = (x[a.chosen[r]] - m) / a.temperature[r];
  a.logprobs[r] = logprob_of(s, a.chosen[r], z, log_sum);
  if (!a.probs) return;
  float* out = a.probs + int64_t(a.row_ids[r]) * a.vocab;
  std::fill(out, out + a.vocab, 0.f);
  for (int i = 0; i < s.count; ++i) out[s.id(i)] = float(s.p[i] / all);
}

// What a token of weight p and scaled logit z owes to the upstream gradients g and k, for j != y.
struct TokenGrad {
  float g, k, inverse, shift, t;  // inverse = 1 / sum of p; shift = entropy - log sum
  vf of(vf p, vf z) const {
    vf slope = splat(-g);
    if (k != 0.f) slope -= splat(k) * (z + splat(shift));
    vf d = p * splat(inverse) * slope;
    d = p > splat(0.f) ? d : (vf){};  // 0 * -infinity
    return t == 1.f ? d : d / splat(t);
  }
  float of(float p, float z) const {
    float lanes[VW];
    store(lanes, of(splat(p), splat(z)));
    return lanes[0];
  }
};

template <class T>
void score_grad_row(const ScoreGradArgs& a, int r, char* scratch) {
  const float* x = a.logits + int64_t(r) * a.vocab;
  T* out = static_cast<T*>(a.out) + int64_t(r) * a.vocab;
  bool has_nan;
  float m = row_max(x, a.vocab, &has_nan), t = a.temperature[r];
  if (has_nan || !std::isfinite(m)) {
    for (int i = 0; i < a.vocab; ++i) store_one(out + i, NAN);
    return;
  }
  Survivors s = survivors(a, r, x, m, scratch);
  double all = total(s.p, s.count), log_sum = std::log(all), entropy = 0;
  if (a.d_entropies[r] != 0.f) entropy = log_sum - sum_p_log_p(s, x, m, t) / all;
  TokenGrad grad{a.d_logprobs[r], a.d_entropies[r], float(1 / all), float(entropy - log_sum), t};
  auto scaled = [&](float v) { return t == 1.f ? v - m : (v - m) / t; };
  if (s.ids) std::fill(out, out + a.vocab, T(0));
  int i = 0;
  for (; !s.ids && i + VW <= s.count; i += VW) {
    vf z = load(x + i) - splat(m);
    store(out + i, grad.of(load(s.p + i), t == 1.f ? z : z / splat(t)));
  }
  for (; i < s.count; ++i) store_one(out + s.id(i), grad.of(s.p[i], scaled(x[s.id(i)])));
  int y = a.chosen[r];
  float own = grad.g / t;
  if (s.has(y)) {
    float z = scaled(x[y]), lanes[VW];
    store(lanes, vexp(splat(z)));
    own += grad.of(lanes[0], z);
  }
  store_one(out + y, own);
}

}  // namespace

Kernel<ScoreGradArgs> score_grad_kernel() {
  return {[](const ScoreGradArgs&, const Step& step) { return step.num_rows[1]; },
          [](const ScoreGradArgs& a, const Step&, const Worker& w, int unit) {
            a.dtype ? score_grad_row<bf16>(a, unit, w.scratch)
                    : score_grad_row<float>(a, unit, w.scratch);
          }};
}

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
