"""Adapters on the linear modules of models behind transformers: nn.Linear and GPT-2's Conv1D.

The module stays where it is, wrapped, so the family's code runs on. Its whole weight is one part
under its own name, which is PEFT's name for it; a fused weight (`qkv_proj` of Phi-3) has one
adapter, as in PEFT. The base rounds as the model's code does, which a DoRA product shares:

    LoRA   round(base(x) + s dropout(x) A^T B^T)
    DoRA   round(m / |W + s B A| * (round(x W^T) + s x A^T B^T) + bias)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sterna.quant.adapted import Span
from sterna.quant.foreign import ForeignQuantLinear
from sterna.train.adapter_modules import AdaptedModule, start_at


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies rows by one weight, plain or quantised."""
    return isinstance(module, nn.Linear | ForeignQuantLinear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether it is GPT-2's Conv1D, whose weight is [K, N]."""
    return type(module).__name__ == "Conv1D" and isinstance(
        getattr(module, "weight", None), nn.Parameter
    )


def weight_of(module: Any) -> Tensor:
    """[N, K], a view of the module's weight where it is plain."""
    if isinstance(module, ForeignQuantLinear):
        return module.quant_weight.dequantize()
    weight: Tensor = module.weight.detach()
    return weight.t() if is_transposed(module) else weight


class AdaptedForeign(AdaptedModule):
    """In place of a linear module of transformers."""

    @property
    def weight(self) -> Any:
        """The base's, which some models read for its dtype."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The base's."""
        return self.base.bias

    def rows(self, span: Span) -> Tensor:
        """See AdaptedModule."""
        return weight_of(self.base)[span.start : span.stop]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        flat = x.reshape(-1, x.shape[-1])
        if not self.is_dora:
            y: Tensor = self.base(x)
            wide = torch.promote_types(y.dtype, torch.float32)
            return (y.to(wide) + self.delta(flat).view(y.shape)).to(y.dtype)
        y = self.scaled(self._product(flat), flat)
        y = y if self.base.bias is None else y + self.base.bias.to(y.dtype)
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return start_at(y, lambda: self.base(x), self.is_identity())

    def _product(self, x: Tensor) -> Tensor:
        """x W^T [T, N], rounded to the base's dtype and widened."""
        base = self.base
        plain = isinstance(base, ForeignQuantLinear)
        y = base.product(x) if plain else F.linear(x, weight_of(base))
        return y.to(torch.promote_types(y.dtype, torch.float32))
