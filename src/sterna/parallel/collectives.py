"""Collectives along one mesh axis. At size 1 each returns its input.

The differentiable ones state their adjoint: all-to-all is its own with the splits swapped;
all-gather's is the sum of each slice over the ranks; all-reduce's is all-reduce. Sums run over the
ranks in axis order on every rank, so that a result has the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sterna.parallel.mesh import Axis


def all_to_all(x: Tensor, axis: Axis, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """Rows of x [sum(send), ...]: `send[i]` go to rank i, `receive[i]` come from it, in order.

    Differentiable. Result [sum(receive), ...].
    """
    if axis.size == 1:
        return x
    assert len(send) == len(receive) == axis.size and sum(send) == x.shape[0]
    return _apply(_AllToAll, x, axis, list(send), list(receive))


def all_gather(x: Tensor, axis: Axis, sizes: Sequence[int]) -> Tensor:
    """x [sizes[rank], ...] of every rank -> [sum(sizes), ...] on each. Differentiable."""
    if axis.size == 1:
        return x
    assert x.shape[0] == sizes[axis.rank]
    return _apply(_AllGather, x, axis, list(sizes))


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the ranks. Differentiable; x is left as it is."""
    return x if axis.size == 1 else _apply(_AllReduce, x, axis)


@torch.no_grad()
def total(x: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """The sum (or "max", "min") over the ranks, without gradient; x is left as it is."""
    if axis.size == 1:
        return x.detach()
    result = x.detach().clone()
    kinds = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
    dist.all_reduce(result, op=kinds[op], group=axis.group)
    return result


def broadcast_object(value: Any, axis: Axis, source: int = 0) -> Any:
    """`value` of the axis's rank `source`, on every rank (pickled: for small things)."""
    if axis.size == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=axis.ranks[source], group=axis.group)
    return holder[0]


def gather_objects(value: Any, axis: Axis) -> list[Any]:
    """The value of every rank, in axis order, on every rank (pickled: for small things)."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


def barrier(axis: Axis) -> None:
    """Wait for every rank of the axis."""
    if axis.size > 1:
        dist.barrier(group=axis.group)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return result


def _exchange(x: Tensor, axis: Axis, send: list[int], receive: list[int]) -> Tensor:
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=axis.group)
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, send: list[int], receive: list[int]) -> Tensor:
        ctx.args = (axis, receive, send)
        return _exchange(x, axis, send, receive)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _exchange(grads[0], *ctx.args), None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, sizes: list[int]) -> Tensor:
        ctx.axis, ctx.sizes = axis, sizes
        longest = max(sizes)
        out = x.new_zeros(axis.size, longest, *x.shape[1:])
        mine = out[axis.rank].clone()
        mine[: x.shape[0]] = x
        dist.all_gather(list(out.unbind(0)), mine, group=axis.group)
        return torch.cat([out[i, :size] for i, size in enumerate(sizes)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        axis, sizes = ctx.axis, ctx.sizes
        own = sizes[axis.rank]
        parts = _exchange(grads[0], axis, sizes, [own] * axis.size)
        grad = parts.view(axis.size, own, *parts.shape[1:]).sum(dim=0)
        return grad, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return total(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return total(grads[0], ctx.axis), None
