"""act(gate) * up with its two sums kept for the backward, where memory allows.

The op `gated_linear` saves its inputs only, and its backward multiplies by both weights again: a
quarter of a block's forward and backward products. Here the forward kernel writes the sums beside
its result, 4 I bytes a token in bfloat16; the result has the op's bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sterna.kernels import ops
from sterna.kernels.backend import backend_for
from sterna.kernels.backward import gated_gradients


class _KeptGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, activation: str, out_features: int) -> Tensor:
        backend = backend_for(x.device.type)
        found: tuple[Tensor, Tensor | None] | None
        found = backend.gated_with_sums(x, weight, activation, out_features)
        if found is None:
            found = ops.gated_linear(x, weight, activation, out_features), None
        ctx.save_for_backward(x, weight, found[1])
        ctx.activation = activation
        return found[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, sums = ctx.saved_tensors
        sums = x @ weight.t() if sums is None else sums
        wants = ctx.needs_input_grad[:2]
        return (
            *gated_gradients(grad.contiguous(), sums, wants, x, weight, ctx.activation),
            None,
            None,
        )


def gated_linear(x: Tensor, weight: Tensor, activation: str, out_features: int) -> Tensor:
    """`ops.gated_linear` on a plain weight, with a graph that keeps the sums. CPU kernels only;
    elsewhere they are computed again.
    """
    apply: Any = _KeptGated.apply
    out: Tensor = apply(x, weight, activation, out_features)
    return out
