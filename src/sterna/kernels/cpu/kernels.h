// The kernels of one instruction set.
#pragma once
#include "args.h"

namespace sterna {
namespace STERNA_ISA {

Kernel<EmbedArgs> embed_kernel();
Kernel<NormArgs> norm_kernel();
Kernel<LinearArgs> linear_kernel();
Kernel<ActivateArgs> activate_kernel();
Kernel<SelectArgs> select_kernel();
Kernel<RopeArgs> rope_kernel();
Kernel<StoreArgs> store_kernel();
Kernel<AttentionArgs> attention_kernel();
Kernel<AttentionGradArgs> attention_grad_kernel();
Kernel<DrawArgs> draw_kernel();
Kernel<ScoreArgs> score_kernel();
Kernel<QuantLinearArgs> quant_linear_kernel();
Kernel<QuantEmbedArgs> quant_embed_kernel();
Kernel<QuantRowsArgs> quant_rows_kernel();
Kernel<EmbedNormArgs> embed_norm_kernel();
Kernel<BidirectionalArgs> bidirectional_kernel();
Kernel<PoolArgs> pool_kernel();
Kernel<DraftCellArgs> draft_cell_kernel();
Kernel<PickArgs> pick_kernel();
Kernel<LoraDownArgs> lora_down_kernel();
Kernel<LoraUpArgs> lora_up_kernel();
Kernel<ScoreGradArgs> score_grad_kernel();
Kernel<GatedGradArgs> gated_grad_kernel();
Kernel<PackArgs> pack_kernel();

}  // namespace STERNA_ISA
}  // namespace sterna
