// Sums over a row and the layer norm made of them.
#pragma once
#include "simd.h"

namespace sterna {
namespace STERNA_ISA {

// sum of f(x) over a row: VW partial sums, then a fixed tree, then the tail in order.
template <class T, class F>
static inline float row_sum(const T* x, int n, F f) {
  vf acc = {};
  int k = 0;
  for (; k + VW <= n; k += VW) acc += f(load(x + k));
  float total = sum(acc);
  for (; k < n; ++k) {
    float lanes[VW];
    store(lanes, f(splat(to_float(x[k]))));
    total += lanes[0];
  }
  return total;
}

// As row_sum, but four chains of additions side by side: one alone waits four cycles a vector.
template <class T, class F>
static inline float wide_row_sum(const T* x, int n, F f) {
  vf acc[4] = {};
  int k = 0;
  for (; k + 4 * VW <= n; k += 4 * VW)
    for (int i = 0; i < 4; ++i) acc[i] += f(load(x + k + i * VW));
  float total = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  return k < n ? total + row_sum(x + k, n - k, f) : total;
}

// x [n] of X, weight and bias (or null) of T -> out of T: (x - mean) / std * weight + bias.
template <class X, class T>
static inline void layer_norm_row(const X* x, const T* weight, const T* bias, int n, float eps,
                                  T* out) {
  float mean = wide_row_sum(x, n, [](vf v) { return v; }) / n;
  float var = wide_row_sum(x, n, [=](vf v) { return (v - splat(mean)) * (v - splat(mean)); });
  float inv = 1.f / std::sqrt(var / n + eps);
  int k = 0;
  for (; k + VW <= n; k += VW) {
    vf v = (load(x + k) - splat(mean)) * splat(inv) * load(weight + k);
    store(out + k, bias ? v + load(bias + k) : v);
  }
  for (; k < n; ++k) {
    float v = (to_float(x[k]) - mean) * inv * to_float(weight[k]);
    store_one(out + k, bias ? v + to_float(bias[k]) : v);
  }
}

}  // namespace STERNA_ISA
}  // namespace sterna
