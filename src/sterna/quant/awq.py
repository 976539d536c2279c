"""AWQ-style scaling: channels with large inputs get finer steps; the norm before takes it back.

y = W x = (W diag(s)) (x / s): W's columns are multiplied by s before rounding and the weight of
the norm that makes x is divided by it, so nothing is added to the forward. s_k = (mean square of
x_k)^(alpha / 2), alpha from a grid, for the smallest output error predicted from mean squares.

Source: AWQ (arXiv 2306.00978), section 3.2. Folded are the inputs of qkv and of gate and up; those
of `out` and `down`, which no norm makes, keep their columns. s is bent so that the norm's new
weight is exact in bfloat16: the product of the two is then what it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sterna.kernels.quant_weight import QuantWeight
from sterna.model.decoder import Decoder
from sterna.model.layers import RMSNorm
from sterna.quant.formats import WeightFormat
from sterna.quant.rtn import quantize_weight
from sterna.quant.stream import weight_of

_ALPHAS = tuple(i / 8 for i in range(8))
_LOWEST, _HIGHEST = 2.0**-6, 2.0**6  # of s: beyond, small channels would be lost in the row


@dataclass(frozen=True, slots=True)
class ChannelScales:
    """columns: module name -> float32 [K], what its columns are multiplied by. norms: parameter
    name -> its new value, exact in bfloat16 (biases of layer norms are rounded)."""

    columns: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]

    @property
    def digest(self) -> str:
        """Equal for equal scales."""
        parts = [(name, s.numpy().tobytes()) for name, s in sorted(self.columns.items())]
        return hashlib.sha256(repr(parts).encode()).hexdigest() if parts else ""


def channel_scales(
    decoder: Decoder, importance: Mapping[str, Tensor], fmt: WeightFormat
) -> ChannelScales:
    """Search the scales of every pair of norm and weight of a plain decoder.

    importance: mean squares of inputs [K] by module name (`calibrate.py`); weights without are
    left alone.
    """
    columns: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    for norm_name, name, is_gated in _pairs(decoder):
        if name not in importance:
            continue
        norm = decoder.get_submodule(norm_name)
        unit = float(isinstance(norm, RMSNorm) and norm.has_unit_offset)
        plain = weight_of(decoder, f"{name}.weight").float()
        gain = weight_of(decoder, f"{norm_name}.weight").float() + unit
        columns[name], folded = _search(plain, gain, unit, importance[name], fmt, is_gated)
        norms[f"{norm_name}.weight"] = folded
        if "bias" in dict(norm.named_parameters()):
            bias = weight_of(decoder, f"{norm_name}.bias").float()
            norms[f"{norm_name}.bias"] = bias / columns[name]
    return ChannelScales(columns, norms)


def _pairs(decoder: Decoder) -> Iterator[tuple[str, str, bool]]:
    """(norm, the weight that alone reads it, is_gated)."""
    has_gate = decoder.config.family.has_gated_mlp
    for i in range(len(decoder.layers)):
        yield f"layers.{i}.attn_norm", f"layers.{i}.attn.qkv", False
        yield f"layers.{i}.mlp_norm", f"layers.{i}.mlp.{'gate_up' if has_gate else 'up'}", has_gate


def _search(
    plain: Tensor,
    gain: Tensor,
    unit: float,
    squares: Tensor,
    fmt: WeightFormat,
    is_gated: bool,
) -> tuple[Tensor, Tensor]:
    """The best (column factors, stored norm weight); alpha 0 leaves both as they are."""
    best_error, best = float("inf"), (torch.ones_like(gain), gain - unit)
    for alpha in _ALPHAS:
        factors, folded = _bent(_power(squares, alpha), gain, unit)
        seen = squares / factors.square()
        scaled = plain * factors
        weight: QuantWeight = quantize_weight(
            scaled, fmt, search="fast", importance=seen, is_gated=is_gated
        )
        error = float(((weight.dequantize() - scaled).square().sum(dim=0) * seen).sum())
        if error < best_error:
            best_error, best = error, (factors, folded)
    return best


def _power(squares: Tensor, alpha: float) -> Tensor:
    s = squares.clamp(min=1e-12).pow(alpha / 2)
    return (s / s.log().mean().exp()).clamp(_LOWEST, _HIGHEST)


def _bent(s: Tensor, gain: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Factors near s for which the norm's stored weight is exact in bfloat16."""
    folded = (gain / s - unit).bfloat16().float()
    new_gain = folded + unit
    is_usable = (gain != 0) & (new_gain != 0)
    factors = torch.where(is_usable, gain / new_gain, 1.0)
    return factors, torch.where(is_usable, folded, gain - unit)
