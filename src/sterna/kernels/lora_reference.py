"""The adapter ops in plain PyTorch; see reference.py and the contract in lora_ops.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sterna.kernels.reference import activate_wide, wide


def lora(
    x: Tensor,
    y: Tensor,
    slots: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Tensor,
    ranks: Tensor,
    starts: Sequence[int],
) -> None:
    """y += s (x A^T) B^T, adapter by adapter."""
    for slot, rows in _groups(x, slots, ranks.shape[1]):
        for p, start in enumerate(starts[:-1]):
            delta = _delta(x, rows, slot, p, a, b, scales, ranks)
            if delta is not None:
                part = y[:, start : starts[p + 1]]
                part[rows] = (wide(part[rows]) + delta).to(y.dtype)


def lora_gated(
    x: Tensor,
    product: Tensor,
    slots: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Tensor,
    ranks: Tensor,
    activation: str,
    out_features: int,
) -> Tensor:
    """act(gate + its delta) * (up + its delta)."""
    halves = [half[:, :out_features].clone() for half in product.chunk(2, dim=1)]
    for slot, rows in _groups(x, slots, ranks.shape[1]):
        for p, half in enumerate(halves):
            delta = _delta(x, rows, slot, p, a, b, scales, ranks)
            if delta is not None:
                half[rows] += delta
    return (activate_wide(halves[0], activation) * halves[1]).to(x.dtype)


def _groups(x: Tensor, slots: Tensor | None, count: int) -> list[tuple[int, Tensor]]:
    """(adapter, its rows) of those that have rows."""
    if slots is None:
        return [(0, torch.arange(len(x), device=x.device))]
    groups = [(slot, (slots == slot).nonzero()[:, 0]) for slot in range(count)]
    return [(slot, rows) for slot, rows in groups if len(rows)]


def _delta(
    x: Tensor,
    rows: Tensor,
    slot: int,
    part: int,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Tensor,
    ranks: Tensor,
) -> Tensor | None:
    """s (x A^T) B^T of one adapter's rows and one part, wide; None where the part has none."""
    scale, rank = float(scales[part, slot]), int(ranks[part, slot])
    if scale == 0.0:
        return None
    inner = wide(x[rows])
    size = b[part].shape[1] // (a[part].shape[1] // x.shape[1])
    down = a[part][slot, : rank * x.shape[1]].view(rank, -1).to(inner.dtype)
    up = b[part][slot, : size * rank].view(size, rank).to(inner.dtype)
    return inner @ down.t() @ up.t() * scale
