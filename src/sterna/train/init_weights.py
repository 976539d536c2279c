"""First weights of a model made from scratch.

Matrices and tables: normal with the config's `initializer_range` (0.02 where it has none); the two
projections that write to the residual stream are smaller by sqrt(2 layers) (GPT-2, section 2.3), so
that its variance does not grow with depth. Norms are the identity, biases zero.
"""

from __future__ import annotations

import torch

from sterna.model.decoder import Decoder
from sterna.train import rounding

_RESIDUAL = (".attn.out.weight", ".mlp.down.weight")


@torch.no_grad()
def init_weights(decoder: Decoder, seed: int) -> None:
    """Fill every parameter; the same bits for the same seed, whatever the dtype's rounding."""
    config = decoder.config
    std = float(config.hf.get("initializer_range") or 0.02)
    source = rounding.generator(seed, 0x1417)
    norm = 0.0 if config.family.has_unit_offset else 1.0
    for name, parameter in decoder.named_parameters():
        if parameter.dim() >= 2:
            scale = (2 * config.num_hidden_layers) ** -0.5 if name.endswith(_RESIDUAL) else 1.0
            drawn = torch.randn(parameter.shape, generator=source) * (std * scale)
            parameter.copy_(drawn)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else norm)
