"""A second copy of the policy's matrices in the layout that kernels read fastest: the same bits.

Reading plain [N, K] weights, a step of 32 sequences takes 1.38 times as long as with packed ones
(docs/adr/0008). The copy costs two bytes a weight in bfloat16 and one pass over the weights after
each update.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sterna.core.errors import ConfigError
from sterna.kernels import ops
from sterna.kernels.backend import backend_for
from sterna.model.decoder import Decoder
from sterna.model.heads import Embedding, LMHead
from sterna.model.layers import GatedLinear, Linear, packed
from sterna.quant.linear import QuantModule
from sterna.train.adapter_modules import AdaptedModule

# Engine steps an update from which a copy pays: SmolLM2 is packed in 12 ms, and a step of 32 rows
# that reads the copy takes 8 ms less. Twice the break-even of 1.5.
LEAST_STEPS = 4


class PackedCopy:
    """`decoder` runs the policy on packed matrices; all else in it is the policy's own."""

    def __init__(self, policy: Decoder) -> None:
        """ConfigError for a policy with an adapter or on a quantised base."""
        if not is_plain(policy):
            raise ConfigError(
                'rollout.weights is "packed", which copies whole plain models; this policy has an '
                'adapter or a quantised base: set it to "policy", or to "merged" with an adapter',
                param="rollout.weights",
            )
        self.decoder = shared_copy(policy)
        self._copies: list[tuple[Tensor, Tensor, bool]] = []
        for module in self.decoder.modules():
            if isinstance(module, Embedding) and self.decoder.lm_head is not None:
                continue  # only looked up, not multiplied
            if isinstance(module, Linear | GatedLinear | LMHead | Embedding):
                is_gated = isinstance(module, GatedLinear)
                plain = module.weight
                module.weight = packed(plain, is_gated)
                self._copies.append((plain.detach(), module.weight.detach(), is_gated))

    @torch.no_grad()
    def renew(self) -> None:
        """Pack the weights as they are now, in place: recorded steps keep the addresses."""
        for plain, kept, is_gated in self._copies:
            ops.pack_weight(plain, is_gated, kept)


def is_plain(policy: Decoder) -> bool:
    """Whether its matrices are whole plain ones: no adapter, no quantised base."""
    return not any(isinstance(m, AdaptedModule | QuantModule) for m in policy.modules())


def can_pack(policy: Decoder) -> bool:
    """Whether there is such a copy of it, in a layout that is read faster."""
    has_layout = policy.device.type == "cpu" and backend_for("cpu").name == "cpu"
    return has_layout and type(policy) is Decoder and is_plain(policy)


def shared_copy(policy: Decoder) -> Decoder:
    """A decoder with modules of its own whose parameters are the policy's."""
    copy = Decoder(policy.config, policy.dtype, "meta", rope_device=policy.device)
    for name, parameter in policy.named_parameters():
        parent, _, leaf = name.rpartition(".")
        module: nn.Module = copy.get_submodule(parent)
        module.register_parameter(leaf, parameter)
    return copy
