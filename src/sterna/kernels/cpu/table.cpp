// Compiled once per instruction set, beside the kernels: the table of that set's functions.
#include "kernels.h"

#define STR2(x) #x
#define STR(x) STR2(x)
#define CAT2(a, b) a##b
#define CAT(a, b) CAT2(a, b)

namespace sterna {

const KernelTable* CAT(STERNA_ISA, _table)() {
  namespace isa = STERNA_ISA;
  static const KernelTable table{STR(STERNA_ISA),   isa::embed_kernel(),    isa::norm_kernel(),
                                 isa::linear_kernel(), isa::activate_kernel(), isa::select_kernel(),
                                 isa::rope_kernel(),  isa::store_kernel(), isa::attention_kernel(),
                                 isa::attention_grad_kernel(), isa::draw_kernel(), isa::score_kernel(),
                                 isa::quant_linear_kernel(), isa::quant_embed_kernel(),
                                 isa::quant_rows_kernel(), isa::embed_norm_kernel(),
                                 isa::bidirectional_kernel(), isa::pool_kernel(),
                                 isa::draft_cell_kernel(), isa::pick_kernel(),
                                 isa::lora_down_kernel(), isa::lora_up_kernel(),
                                 isa::score_grad_kernel(), isa::gated_grad_kernel(),
                                 isa::pack_kernel()};
  return &table;
}

}  // namespace sterna
