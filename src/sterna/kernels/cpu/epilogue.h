// What follows the sum of a linear: bias, activation, residual, gate, softcap; one rounding, at the store.
#pragma once
#include "activations.h"

namespace sterna {
namespace STERNA_ISA {

template <class T>
static inline void store_cols(T* out, vf v, int cols) {
  if (cols >= VW) return store(out, v);
  float lanes[VW];
  store(lanes, v);
  for (int i = 0; i < cols; ++i) store_one(out + i, lanes[i]);
}

template <class T>
static inline vf load_cols(const T* p, int cols) {
  if (cols >= VW) return load(p);
  float lanes[VW] = {};
  for (int i = 0; i < cols; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}

// A: LinearArgs or QuantLinearArgs. Lanes past the last output are dropped.
template <class T, class A>
static inline void finish(const A& a, int row, int col, vf v) {
  int cols = a.out_features - col;
  if (cols <= 0) return;
  if (a.bias) v += load_cols(static_cast<const T*>(a.bias) + col, cols);
  if (a.act) v = activated<sizeof(T) == 2>(a.act, v);
  int64_t at = int64_t(row) * a.out_features + col;
  if (a.residual) v += load_cols(static_cast<const T*>(a.residual) + at, cols);
  if (!a.out_f32) return store_cols(static_cast<T*>(a.out) + at, v, cols);
  if (a.scale != 1.f) v *= splat(a.scale);
  if (a.softcap > 0.f) v = splat(a.softcap) * vtanh(v * splat(1.f / a.softcap));
  store_cols(static_cast<float*>(a.out) + at, v, cols);
}

template <class T>
static inline vf gated(int gate, vf g, vf u) {
  if (gate == ACT_GELU) return activated<sizeof(T) == 2>(ACT_GELU, g) * u;
  return (gate == ACT_SILU ? vsilu(g) : vgelu_tanh(g)) * u;
}

}  // namespace STERNA_ISA
}  // namespace sterna
