"""Encoders on quantised weights: every linear layer rounded at load; embeddings stay as they are.

The word table is only looked up, so fewer bits there save memory but no time.
"""

from __future__ import annotations

from sterna.model.encoder import Encoder
from sterna.model.layers import GatedLinear, Linear
from sterna.quant.formats import WeightFormat
from sterna.quant.linear import replace_weight
from sterna.quant.rtn import quantize_weight


def quantize_encoder(encoder: Encoder, fmt: WeightFormat) -> None:
    """Round every linear weight of an encoder to `fmt`, in place."""
    for name, module in list(encoder.named_modules()):
        if isinstance(module, Linear | GatedLinear):
            is_gated = isinstance(module, GatedLinear)
            plain = module.weight.detach()
            weight = quantize_weight(plain, fmt, is_gated=is_gated, name=name)
            replace_weight(encoder, name, weight)
