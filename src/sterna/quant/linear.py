"""The decoder's modules on quantised weights, put in the place of the plain ones by name.

Same forwards, same signatures; the decoder notices nothing. Weights are buffers, so they follow
`.to(device)` and are no parameters: gradients flow through to the activations only (a frozen
base under adapters). Tiles are the kernels' own layout, so `prepare_inference` has nothing to do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from sterna.core.errors import ConfigError
from sterna.kernels import ops
from sterna.kernels.quant_weight import FlatWeight, QuantWeight, int8_unit
from sterna.model.decoder import Decoder
from sterna.model.encoder import Encoder
from sterna.model.heads import Embedding, LMHead
from sterna.model.layers import GatedLinear, Linear
from sterna.model.swiftkv import new_decoder


class QuantModule(nn.Module):
    """Holds one quantised weight."""

    tiles: Tensor
    scales: Tensor
    table: Tensor
    row_formats: Tensor | None

    def __init__(self, weight: QuantWeight) -> None:
        super().__init__()
        for name in ("tiles", "scales", "table", "row_formats"):
            self.register_buffer(name, getattr(weight, name))
        self.bits = weight.bits
        self.group_size = weight.group_size
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        self.is_gated = weight.is_gated
        self.int8_activations = False  # use_int8_activations switches it

    @property
    def quant_weight(self) -> QuantWeight:
        """The weight, sharing this module's tensors."""
        return QuantWeight(*self._flat(), self.out_features, self.is_gated)

    def prepare_inference(self) -> None:
        """Nothing to do: tiles are what the kernels read."""

    def _flat(self) -> FlatWeight:
        return (
            self.tiles,
            self.scales,
            self.table,
            self.row_formats,
            self.bits,
            self.group_size,
            self.in_features,
        )


class QuantLinear(QuantModule):
    """activation(x @ weight.T + bias) + residual; in place of Linear. The bias stays as it was."""

    bias: nn.Parameter | None

    def __init__(self, weight: QuantWeight, bias: nn.Parameter | None) -> None:
        super().__init__(weight)
        self.bias = bias

    def forward(
        self, x: Tensor, residual: Tensor | None = None, activation: str = "none"
    ) -> Tensor:
        """x [T, K] -> [T, N]; `residual` [T, N] is added before the rounding."""
        rest = (self.bias, residual, self.out_features, self.int8_activations, activation)
        return ops.quant_linear(x, *self._flat(), *rest)


class QuantGatedLinear(QuantModule):
    """act(x @ gate.T) * (x @ up.T); in place of GatedLinear."""

    def __init__(self, weight: QuantWeight, activation: str) -> None:
        super().__init__(weight)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, I]."""
        return ops.quant_gated_linear(
            x, *self._flat(), self.activation, self.out_features, self.int8_activations
        )


class QuantLMHead(QuantModule):
    """The logits' weight; in place of LMHead."""

    def logits(self, hidden: Tensor, softcap: float) -> Tensor:
        """hidden [R, D] -> float32 logits [R, V]."""
        return ops.quant_logits(
            hidden, *self._flat(), self.out_features, softcap, 1.0, self.int8_activations
        )


class QuantEmbedding(QuantLMHead):
    """Token rows times `scale`, and the logits when the head is tied: one table for both."""

    def __init__(self, weight: QuantWeight, scale: float, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.scale = scale
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [T] -> [T, D]."""
        return ops.quant_embed(tokens, *self._flat(), self.scale, self.dtype)


def replace_weight(decoder: Decoder | Encoder, name: str, weight: QuantWeight) -> None:
    """Put `weight` in the place of module `name`, whose other settings are kept.

    `name` is one of `weight_shapes(decoder)`; sizes must be those of the module.
    """
    parent, _, leaf = name.rpartition(".")
    old = decoder.get_submodule(name)
    setattr(decoder.get_submodule(parent), leaf, _quantised(old, weight, decoder.dtype))


def _quantised(old: nn.Module, weight: QuantWeight, dtype: torch.dtype) -> QuantModule:
    if isinstance(old, Linear):
        return QuantLinear(weight, old.bias)
    if isinstance(old, GatedLinear):
        return QuantGatedLinear(weight, old.activation)
    if isinstance(old, Embedding):
        return QuantEmbedding(weight, old.scale, dtype)
    assert isinstance(old, LMHead), type(old)
    return QuantLMHead(weight)


def use_int8_activations(decoder: Decoder | Encoder) -> None:
    """Let every quantised weight round the rows of its input to int8 (W6A8 with six bits).

    Plain weights beside quantised ones go on as they are. Raises ConfigError when there is no
    quantised weight, one is of fp8 (no integers), or the decoder is not on a CPU.
    """
    modules = list(quant_modules(decoder))
    if not modules:
        raise ConfigError(
            "activations is int8, but the weights are plain; int8 needs quantised ones: add "
            "weights=fp6 (or another format but fp8), or leave activations at auto",
            param="activations",
        )
    if decoder.device.type != "cpu":
        raise ConfigError(
            f"activations is int8, the device {decoder.device}; int8 activations run on the CPU",
            param="activations",
        )
    for name, module in modules:
        if int8_unit(module.table) == 0.0:
            raise ConfigError(
                f"activations is int8, but {name} is stored in fp8, whose values are no small "
                "whole numbers; quantise it to another format, or leave activations at auto",
                param="activations",
            )
    for _, module in modules:
        module.int8_activations = True


def dequantize_decoder(decoder: Decoder, names: Collection[str] | None = None) -> None:
    """Put plain weights, rounded to the decoder's dtype, in the place of the quantised ones.

    `names`: the modules this is about; None = all.
    """
    empty = new_decoder(decoder.config, decoder.dtype, "meta", rope_device=decoder.device)
    for name, module in list(quant_modules(decoder)):
        if names is not None and name not in names:
            continue
        parent, _, leaf = name.rpartition(".")
        plain = empty.get_submodule(name)
        values = module.quant_weight.dequantize().to(decoder.dtype)
        plain.register_parameter("weight", nn.Parameter(values))
        bias = getattr(module, "bias", None)
        if bias is not None:
            plain.register_parameter("bias", bias)
        setattr(decoder.get_submodule(parent), leaf, plain)


def weight_shapes(decoder: Decoder) -> Iterator[tuple[str, int, int, bool]]:
    """(name, rows, in_features, is_gated) of every weight that can be quantised, in order.

    A tied head is the embedding's table and comes once.
    """
    for name, module in decoder.named_modules():
        if isinstance(module, Linear | GatedLinear | LMHead | Embedding):
            rows, in_features = module.weight.shape
            yield name, rows, in_features, isinstance(module, GatedLinear)


def quant_modules(decoder: nn.Module) -> Iterator[tuple[str, QuantModule]]:
    """(name, module) of every quantised weight."""
    for name, module in decoder.named_modules():
        if isinstance(module, QuantModule):
            yield name, module


def describe_weights(decoder: nn.Module) -> str:
    """One line for the log: how many weights are quantised and what they take; "" when none is."""
    modules = [module for _, module in quant_modules(decoder)]
    weights = [module.quant_weight for module in modules]
    if not weights:
        return ""
    count = sum(w.out_features * (1 + w.is_gated) * w.in_features for w in weights)
    num_bytes = sum(w.nbytes for w in weights)
    widths = "/".join(str(bits) for bits in sorted({w.bits for w in weights}))
    inputs = f", int8 activations (W{widths}A8)" if modules[0].int8_activations else ""
    return (
        f"{len(weights)} weights quantised to {widths} bits, {8 * num_bytes / count:.2f} a weight "
        f"with scales, {num_bytes / 1e6:,.0f} MB{inputs}"
    )
