"""The quantised ops in plain PyTorch: unpack, dequantise, multiply in float32, round once.

The specification and oracle of the fast kernels, and the backward of every op (`autograd.py`):
differentiable in the activations, bias and residual, and in the scales and the table. See
`reference.py` for the legend; w stands for the flat weight of `quant_weight.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sterna.kernels import reference
from sterna.kernels.quant_weight import dequantize_tiles, drop_half_padding


def quant_linear(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    table: Tensor,
    row_formats: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    int8_activations: bool = False,
    activation: str = "none",
) -> Tensor:
    """activation(x @ w.T + bias) + residual, rounded once."""
    w = dequantize_tiles(tiles, scales, table, row_formats, bits, group_size, in_features)
    rows = _activations(x, int8_activations)
    out = reference.linear(rows, w[:out_features], bias, residual, out_features, activation)
    return out.to(x.dtype)


def quant_gated_linear(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    table: Tensor,
    row_formats: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    activation: str,
    out_features: int,
    int8_activations: bool = False,
) -> Tensor:
    """activation(x @ gate.T) * (x @ up.T)."""
    w = dequantize_tiles(tiles, scales, table, row_formats, bits, group_size, in_features)
    halves, rows = drop_half_padding(w, out_features), _activations(x, int8_activations)
    return reference.gated_linear(rows, halves, activation, out_features).to(x.dtype)


def quant_logits(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    table: Tensor,
    row_formats: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    vocab_size: int,
    softcap: float = 0.0,
    scale: float = 1.0,
    int8_activations: bool = False,
) -> Tensor:
    """float32 x @ w.T * scale, then the soft cap."""
    w = dequantize_tiles(tiles, scales, table, row_formats, bits, group_size, in_features)
    rows = _activations(x, int8_activations)
    return reference.logits(rows, w[:vocab_size], vocab_size, softcap, scale)


def int8_rows(x: Tensor) -> Tensor:
    """x [T, K] on the int8 grid of each row, float32: round(x * 127 / absmax) * (absmax / 127).

    A row with an element that is not finite becomes NaN.
    """
    largest = x.float().abs().amax(dim=1, keepdim=True)
    # a tensor over a tensor: `127.0 / largest` is a reciprocal and a product, rounded twice
    inverse = torch.where(largest > 1e-30, torch.full_like(largest, 127.0) / largest, 0.0)
    rows = (x.float() * inverse).round() * (largest / 127.0)
    return torch.where(largest.isfinite(), rows, torch.nan)


def _activations(x: Tensor, is_int8: bool) -> Tensor:
    return int8_rows(x) if is_int8 else x


def quant_embed(
    tokens: Tensor,
    tiles: Tensor,
    scales: Tensor,
    table: Tensor,
    row_formats: Tensor | None,
    bits: int,
    group_size: int,
    hidden_size: int,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of the weight times `scale`, rounded once to `dtype`; only their blocks are decoded."""
    blocks, row_of = torch.unique(tokens // 16, return_inverse=True)
    formats = None if row_formats is None else row_formats[blocks]
    parts = (tiles[blocks], scales[blocks], table, formats)
    w = dequantize_tiles(*parts, bits, group_size, hidden_size)
    rows = w.index_select(0, row_of * 16 + tokens % 16)
    return (rows if scale == 1.0 else rows * scale).to(dtype)
