// What the two paths of quant_linear share: how a call is cut into units.
#pragma once
#include "epilogue.h"
#include "walk.h"

namespace sterna {
namespace STERNA_ISA {

// Output blocks of a call; a gated call pairs block b of the gate with block b of up.
INLINE int num_blocks(const QuantLinearArgs& a) { return (a.out_features + BLOCK - 1) / BLOCK; }

// Few rows: codes are decoded in registers, `few_blocks` output blocks a unit.
constexpr int FEW_MAX = 8;
bool few_serves(const QuantLinearArgs& a, int rows);
int few_units(const QuantLinearArgs& a, int rows);
void few_run(const QuantLinearArgs& a, int rows, const Worker& w, int unit);

// Integer activations.
int int8_units(const QuantLinearArgs& a, int rows);
void int8_run(const QuantLinearArgs& a, int rows, const Worker& w, int unit);

}  // namespace STERNA_ISA
}  // namespace sterna
