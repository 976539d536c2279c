// Compiled once per instruction set, beside the kernels: the table of that set's functions.
#include "args.h"

#define STR2(x) #x
#define STR(x) STR2(x)
#define CAT2(a, b) a##b
#define CAT(a, b) CAT2(a, b)

namespace sterna {
namespace STERNA_ISA {
void embed(const EmbedArgs&, const Step&, const Worker&);
void norm(const NormArgs&, const Step&, const Worker&);
void linear(const LinearArgs&, const Step&, const Worker&);
void activate(const ActivateArgs&, const Step&, const Worker&);
void select(const SelectArgs&, const Step&, const Worker&);
void rope(const RopeArgs&, const Step&, const Worker&);
void attention(const AttentionArgs&, const Step&, const Worker&);
}  // namespace STERNA_ISA

const KernelTable* CAT(STERNA_ISA, _table)() {
  namespace isa = STERNA_ISA;
  static const KernelTable table{STR(STERNA_ISA), isa::embed,  isa::norm, isa::linear,
                                 isa::activate,   isa::select, isa::rope, isa::attention};
  return &table;
}

}  // namespace sterna
