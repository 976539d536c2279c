"""Quantised weights in models behind transformers: the frozen base of adapters (QLoRA).

The linear modules of the blocks are rounded at load, as `load_quantized` rounds those of native
models; embeddings, head, norms and biases stay plain. For training only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sterna.core.errors import UnsupportedModelError
from sterna.kernels import ops
from sterna.kernels.quant_weight import QuantWeight
from sterna.model.hf import HFDecoder
from sterna.quant.formats import WeightFormat
from sterna.quant.linear import QuantModule
from sterna.quant.rtn import quantize_weight


class ForeignQuantLinear(QuantModule):
    """y = x @ weight.T + bias; in place of nn.Linear or Conv1D, which `plain` makes again."""

    bias: nn.Parameter | None

    def __init__(self, weight: QuantWeight, old: Any, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.bias = old.bias
        self._dtype = dtype
        self._is_conv1d = type(old).__name__ == "Conv1D"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return self._rows(x.reshape(-1, x.shape[-1]), self.bias).view(*x.shape[:-1], -1)

    def product(self, x: Tensor) -> Tensor:
        """x [T, K] -> x W^T [T, N], without the bias."""
        return self._rows(x, None)

    def _rows(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = ops.quant_linear(
            x, *self.quant_weight.flat(), bias, None, self.out_features, False
        )
        return out

    def plain(self) -> nn.Module:
        """The module of transformers with the dequantised weight, rounded to the model's dtype."""
        weight = self.quant_weight.dequantize().to(self._dtype)
        if self._is_conv1d:
            from transformers.pytorch_utils import Conv1D

            made: Any = Conv1D(self.out_features, self.in_features)
            weight = weight.t().contiguous()
        else:
            made = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        made.weight = nn.Parameter(weight)
        if self.bias is not None:
            made.bias = self.bias
        return made  # type: ignore[no-any-return]


def quantize_foreign(decoder: HFDecoder, fmt: WeightFormat) -> None:
    """Round the linear modules of the blocks to `fmt`, in place, one by one.

    Raises UnsupportedModelError for models with experts, whose weights are no linear modules, and
    QuantizeError for a format that does not fit a weight.
    """
    for layer in decoder.layers:
        _refuse_experts(decoder, layer)
        for name, module in list(layer.named_modules()):
            if type(module) is nn.Linear or type(module).__name__ in ("Conv1D", "FalconLinear"):
                _replace(layer, name, _quantised(module, fmt, decoder.dtype, name))


def dequantize_foreign(decoder: nn.Module) -> None:
    """Put plain modules in the place of the quantised ones."""
    for name, module in list(decoder.named_modules()):
        if isinstance(module, ForeignQuantLinear):
            _replace(decoder, name, module.plain())


def _quantised(module: Any, fmt: WeightFormat, dtype: torch.dtype, name: str) -> ForeignQuantLinear:
    plain = module.weight.detach()
    plain = plain.t().contiguous() if type(module).__name__ == "Conv1D" else plain
    return ForeignQuantLinear(quantize_weight(plain, fmt, search="fast", name=name), module, dtype)


def _refuse_experts(decoder: HFDecoder, layer: nn.Module) -> None:
    stacked = [n for n, p in layer.named_parameters() if p.dim() > 2]
    if stacked:
        raise UnsupportedModelError(
            f"{type(decoder.model).__name__}: {stacked[0]} holds all experts in one tensor, which "
            "would stay plain; train its adapter over plain weights (model.weights = 'auto')",
            param="model.weights",
        )


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
