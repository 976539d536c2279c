"""Adapters of one weight in training: the adapter ops with a gradient.

Serving keeps several adapters in slots (engine/adapters.py); here there is one, whose A and B are
read where the optimizer writes them. Both run the same ops, so a rollout and the training step that
follows it have one forward.

    y += s (x A^T) B^T      dx = s (g B) A, dA = s (g B)^T x, dB = s g^T (x A^T), dy = g

Legend: T rows, K in_features, N out_features, n outputs of a part, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sterna.kernels import lora_ops
from sterna.kernels.backward import d_activate
from sterna.kernels.reference import activate_wide, wide

# A [r, K] and B [n, r] of a part; None where it has no adapter.
Pair = tuple[Tensor, Tensor] | None


@dataclass(frozen=True, slots=True)
class OneAdapter:
    """What the ops take besides A and B, kept: a recorded step holds these addresses."""

    scales: Tensor  # float32 [parts, 1]; 0 = no adapter
    ranks: Tensor  # int32 [parts, 1]
    empty: Tensor  # in the place of the tensors that a part does not have
    starts: tuple[int, ...]

    @staticmethod
    def of(pairs: Sequence[Pair], scales: Sequence[float], starts: Sequence[int]) -> OneAdapter:
        """Of parts whose outputs begin at `starts` [parts + 1]."""
        device = next(pair[0].device for pair in pairs if pair is not None)
        factors = [[0.0 if p is None else s] for p, s in zip(pairs, scales, strict=True)]
        ranks = [[0 if pair is None else pair[0].shape[0]] for pair in pairs]
        return OneAdapter(
            torch.tensor(factors, device=device),
            torch.tensor(ranks, dtype=torch.int32, device=device),
            torch.zeros(1, 0, device=device),
            tuple(starts),
        )

    def tensors(self, pairs: Sequence[Pair]) -> tuple[list[Tensor], list[Tensor]]:
        """A and B of every part as slot 0, in the adapter's own memory."""
        found = [
            (self.empty, self.empty)
            if pair is None
            else (pair[0].detach().view(1, -1), pair[1].detach().view(1, -1))
            for pair in pairs
        ]
        return [a for a, _ in found], [b for _, b in found]


def lora_add(x: Tensor, y: Tensor, pairs: Sequence[Pair], one: OneAdapter) -> Tensor:
    """y [T, N] + s (x A^T) B^T, of x [T, K]. Without a gradient y is written in place."""
    if not torch.is_grad_enabled():
        return _add(x, y, pairs, one)
    apply: Any = _Add.apply
    out: Tensor = apply(x, y, one, *_flat(pairs))
    return out


def lora_act(
    x: Tensor, product: Tensor, pairs: Sequence[Pair], one: OneAdapter, activation: str
) -> Tensor:
    """`lora_ops.lora_gated` of one adapter: product float32 [T, W] -> [T, I] in x's dtype."""
    if not torch.is_grad_enabled():
        return _act(x, product, pairs, one, activation)
    apply: Any = _Act.apply
    out: Tensor = apply(x, product, one, activation, *_flat(pairs))
    return out


def _add(x: Tensor, y: Tensor, pairs: Sequence[Pair], one: OneAdapter) -> Tensor:
    a, b = one.tensors(pairs)
    lora_ops.lora(x, y, None, a, b, one.scales, one.ranks, list(one.starts))
    return y


def _act(
    x: Tensor, product: Tensor, pairs: Sequence[Pair], one: OneAdapter, activation: str
) -> Tensor:
    a, b = one.tensors(pairs)
    return lora_ops.lora_gated(
        x, product, None, a, b, one.scales, one.ranks, activation, one.starts[1]
    )


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, one: OneAdapter, *flat: Tensor | None) -> Tensor:
        ctx.one = one
        ctx.save_for_backward(x, *flat)
        return _add(x, y.clone(), _pairs(flat), one)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *flat = ctx.saved_tensors
        d_x, d_flat = _backward(wide(grad), x, _pairs(flat), ctx.one)
        return (d_x, grad, None, *d_flat)


class _Act(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, product: Tensor, one: OneAdapter, activation: str, *flat: Tensor | None
    ) -> Tensor:
        ctx.one, ctx.activation = one, activation
        ctx.save_for_backward(x, product, *flat)
        return _act(x, product, _pairs(flat), one, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, product, *flat = ctx.saved_tensors
        pairs, one = _pairs(flat), ctx.one
        size = one.starts[1]
        gate, up = (half[:, :size].clone() for half in product.chunk(2, dim=1))
        for half, pair, scale in zip((gate, up), pairs, one.scales[:, 0].tolist(), strict=True):
            if pair is not None:
                half += wide(x) @ pair[0].t() @ pair[1].t() * scale
        g = wide(grad)
        d_pre = torch.cat(
            [d_activate(g * up, gate, ctx.activation), g * activate_wide(gate, ctx.activation)],
            dim=1,
        )
        d_product = torch.zeros_like(product)
        for half, part in zip(d_product.chunk(2, dim=1), d_pre.chunk(2, dim=1), strict=True):
            half[:, :size] = part
        d_x, d_flat = _backward(d_pre, x, pairs, one)
        return (d_x, d_product, None, None, *d_flat)


def _flat(pairs: Sequence[Pair]) -> list[Tensor | None]:
    return [tensor for pair in pairs for tensor in (pair or (None, None))]


def _pairs(flat: Sequence[Tensor | None]) -> list[Pair]:
    found: list[Pair] = []
    for a, b in zip(flat[::2], flat[1::2], strict=True):
        found.append(None if a is None or b is None else (a.detach(), b.detach()))
    return found


def _backward(
    grad: Tensor, x: Tensor, pairs: Sequence[Pair], one: OneAdapter
) -> tuple[Tensor, list[Tensor | None]]:
    """grad [T, N], wide, at the sum -> gradient of x, and of A and B of every part."""
    inner, d_x = wide(x), torch.zeros_like(wide(x))
    found: list[Tensor | None] = []
    for p, pair in enumerate(pairs):
        if pair is None:
            found += [None, None]
            continue
        a, b = (wide(tensor).to(inner.dtype) for tensor in pair)
        g = grad[:, one.starts[p] : one.starts[p + 1]] * float(one.scales[p, 0])
        back = g @ b
        d_x.addmm_(back, a)
        found += [(back.t() @ inner).to(pair[0].dtype), (g.t() @ (inner @ a.t())).to(pair[1].dtype)]
    return d_x.to(x.dtype), found
