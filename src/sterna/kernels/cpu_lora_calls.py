"""The calls of the adapter ops; see cpu_calls.py."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sterna.core.errors import KernelError
from sterna.kernels.cpu_calls import ACTIVATIONS, DTYPES, Call, Sink, address


def lora(
    sink: Sink,
    x: Tensor,
    y: Tensor,
    slots: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Tensor,
    ranks: Tensor,
    starts: Sequence[int],
) -> None:
    _check(*a, *b, scales)
    parts = _parts(a, b, scales, ranks, starts)
    rest = (y.shape[1], 0, 0, 0)
    _call(sink, x, y, None, slots, parts, rest)


def lora_gated(
    sink: Sink,
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
    _check(*a, *b, scales, product)
    parts = _parts(a, b, scales, ranks, (0, out_features, 2 * out_features))
    out = sink.empty(x.shape[0], out_features, x.dtype, sink.kind(x))
    width = product.shape[1]
    rest = (out_features, ACTIVATIONS[activation], width // 2, width)
    _call(sink, x, out, product, slots, parts, rest)
    return out


def _check(*tensors: Tensor) -> None:
    """KernelError: addresses carry no dtype, and other bytes would be read as float32."""
    if any(x.dtype != torch.float32 for x in tensors):
        raise KernelError("adapters and the product they are added to must be float32")


def _call(
    sink: Sink,
    x: Tensor,
    out: Tensor,
    product: Tensor | None,
    slots: Tensor | None,
    parts: tuple[list[int], ...],
    rest: tuple[int, int, int, int],
) -> None:
    (rows, in_features), kind = x.shape, sink.kind(x)
    max_rank = max(max(parts[4][::2]) // in_features, 1)
    inner = sink.empty(rows, len(parts[0]) * max_rank, torch.float32, kind)
    counts, dtype = sink.counts(rows, 0), DTYPES[x.dtype]
    sink.kernels.lora_down(
        sink.tape, *counts, x.data_ptr(), address(slots), inner.data_ptr(),
        *parts, kind, dtype, in_features, max_rank,
    )  # fmt: skip
    width, *gate = rest
    sink.kernels.lora_up(
        sink.tape, *counts, inner.data_ptr(), address(slots), address(product),
        out.data_ptr(), *parts, kind, dtype, width, max_rank, *gate,
    )  # fmt: skip


def _parts(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Tensor,
    ranks: Tensor,
    starts: Sequence[int],
) -> Any:
    """Addresses of A, B, scales and ranks; strides of A and B by turns; starts. A list each."""
    return (
        [x.data_ptr() for x in a],
        [x.data_ptr() for x in b],
        [x.data_ptr() for x in scales],
        [x.data_ptr() for x in ranks],
        list(chain.from_iterable((x.shape[1], y.shape[1]) for x, y in zip(a, b, strict=True))),
        list(starts),
    )


LORA_CALLS: dict[str, Call] = {"lora": lora, "lora_gated": lora_gated}
