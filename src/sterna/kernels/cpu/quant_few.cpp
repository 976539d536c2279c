#include "quant.h"

namespace sterna {
namespace STERNA_ISA {
bool few_serves(const QuantLinearArgs&, int) { return false; }
int few_units(const QuantLinearArgs&, int) { return 0; }
void few_run(const QuantLinearArgs&, int, const Worker&, int) {}
int int8_units(const QuantLinearArgs&, int) { return 0; }
void int8_run(const QuantLinearArgs&, int, const Worker&, int) {}
}  // namespace STERNA_ISA
}  // namespace sterna
