// What the two paths of quant_linear share: how a call is cut into units.
#pragma once
#include "epilogue.h"
#include "walk.h"

namespace sterna {
namespace STERNA_ISA {

// Output blocks of a call; a gated call pairs block b of the gate with block b of up.
INLINE int num_blocks(const QuantLinearArgs& a) { return (a.out_features + BLOCK - 1) / BLOCK; }

// The gate of N vectors at once: side by side, so that their chains of 20 steps overlap. (A vector
// at a time: 576 x 1536 gated with 512 rows 2,400 us, like this 2,160.)
template <int N>
INLINE void gate_all(int gate, vf (&g)[N], const vf (&u)[N]) {
  if (gate == ACT_SILU) {
    UNROLL for (int i = 0; i < N; ++i) g[i] = vsilu(g[i]) * u[i];
  } else {
    UNROLL for (int i = 0; i < N; ++i) g[i] = vgelu_tanh(g[i]) * u[i];
  }
}

// Codes decoded in registers. At 128 rows the panel takes over: 170 against 176 us for 576 x 960,
// 636 against 650 gated, 17 rows 26 against 43.
constexpr int FEW_MAX = 128;
bool few_serves(const QuantLinearArgs& a, int rows);
int few_units(const QuantLinearArgs& a, int rows);
void few_run(const QuantLinearArgs& a, int rows, const Worker& w, int unit);

// Integer activations.
int int8_units(const QuantLinearArgs& a, int rows);
void int8_run(const QuantLinearArgs& a, int rows, const Worker& w, int unit);

}  // namespace STERNA_ISA
}  // namespace sterna
