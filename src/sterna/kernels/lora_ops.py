"""The adapter ops; the contract of ops.py holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from sterna.kernels import optable

_sterna = optable.define()
_lora: Callable[..., None] = _sterna.lora.default
_lora_gated: Callable[..., Tensor] = _sterna.lora_gated.default


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
    """y [T, N] += s (x A^T) B^T, in place, for the rows of x [T, K] that have an adapter.

    slots [T] int32: the adapter of each row, -1 = none; None: every row has the first. Part p of
    the outputs, [starts[p], starts[p + 1]), has matrices of its own: a[p] float32 [slots, >= r K]
    holds [r, K] of each adapter and b[p] [slots, >= n r] its [n, r], r of ranks [parts, slots]
    int32; scales float32 [parts, slots], 0 = that part has none (its tensors may be empty). Both
    products and their sum with y are float32, then y is rounded. Inference only: kernels/lora.py
    has the gradient. Shapes are the caller's care.
    """
    _lora(x, y, slots, a, b, scales, ranks, starts)


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
    """`gated_linear` with adapters, from its product: x [T, K] -> [T, I] in x's dtype.

    product: float32 [T, W], gate at 0 and up at W / 2, by `logits` or `quant_logits`, so that rows
    without an adapter get the bits of `gated_linear`. The rest as in `lora`; part 0 is the gate.
    """
    return _lora_gated(x, product, slots, a, b, scales, ranks, activation, out_features)
