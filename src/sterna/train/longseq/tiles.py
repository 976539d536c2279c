"""A function of rows, run a tile of rows at a time, forward and backward.

The forward keeps nothing but its inputs; the backward runs each tile again and adds up the
weights' gradients in float32, so that a weight gets one gradient whatever the number of tiles. That
is what DDP and FSDP2 count on, and why ranks may cut their rows into different numbers of tiles.
(Sequence tiling: ALST, arXiv 2506.13996, 3.3; there the weights' gradients come tile by tile.)

A row function maps tensors of T rows to one tensor of T rows, row by row. Integer inputs
(positions) have no gradient. What it draws (dropout) is drawn again alike in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

RowFunction = Callable[..., Tensor]


def tile_slices(num_rows: int, tile: int) -> Iterator[slice]:
    """The tiles of `num_rows` rows; tile 0 = one of all. No rows are one empty tile."""
    size = tile or max(num_rows, 1)
    for begin in range(0, max(num_rows, 1), size):
        yield slice(begin, min(begin + size, num_rows))


class WeightSums:
    """The gradients of some weights, added up in float32 (float64 for float64 weights)."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = weights
        self._sums: list[Tensor | None] = [None] * len(weights)

    def add(self, index: int, grad: Tensor) -> None:
        """One tile's gradient of weight `index`."""
        held = self._sums[index]
        if held is None:
            dtype = torch.promote_types(grad.dtype, torch.float32)
            self._sums[index] = grad.to(dtype, copy=True)
        else:
            held += grad

    def take(self) -> tuple[Tensor | None, ...]:
        """One gradient a weight in its dtype; None for one that took no part."""
        pairs = zip(self._sums, self.weights, strict=True)
        return tuple(None if total is None else total.to(w.dtype) for total, w in pairs)


def forward_tiles(function: RowFunction, inputs: Sequence[Tensor], tile: int) -> Tensor:
    """The function's output [T, ...], no gradient recorded."""
    slices = list(tile_slices(len(inputs[0]), tile))
    with torch.no_grad():
        if len(slices) == 1:
            return function(*inputs)
        out = None
        for part in slices:
            y = function(*(x[part] for x in inputs))
            out = y.new_empty(len(inputs[0]), *y.shape[1:]) if out is None else out
            out[part] = y
    assert out is not None
    return out


def backward_tiles(
    function: RowFunction,
    inputs: Sequence[Tensor],
    grad: Tensor,
    tile: int,
    sums: WeightSums,
) -> list[Tensor | None]:
    """Gradients of the inputs [T, ...] (None for integers); those of the weights go to `sums`."""
    found: list[Tensor | None] = [
        torch.empty_like(x) if x.is_floating_point() else None for x in inputs
    ]
    for part in tile_slices(len(inputs[0]), tile):
        leaves = [x[part].detach().requires_grad_(x.is_floating_point()) for x in inputs]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        with torch.enable_grad():
            y = function(*leaves)
        grads = torch.autograd.grad(y, [*wanted, *sums.weights], grad[part], allow_unused=True)
        mine = iter(grads[: len(wanted)])
        for out in found:
            if out is not None:
                value = next(mine)
                out[part] = 0 if value is None else value
        for index, value in enumerate(grads[len(wanted) :]):
            if value is not None:
                sums.add(index, value)
    return found


@dataclass(frozen=True, slots=True)
class RandomState:
    """Where the random numbers stand: of the CPU (5 KB) and, for its tensors, of a GPU."""

    cpu: Tensor
    device: torch.device | None
    gpu: Tensor | None

    @staticmethod
    def now(like: Tensor) -> RandomState:
        """The state that ops on tensors such as `like` draw from next."""
        device = like.device if like.device.type == "cuda" else None
        gpu = None if device is None else torch.cuda.get_rng_state(device)
        return RandomState(torch.get_rng_state(), device, gpu)

    def use(self) -> None:
        """Draw from here on."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None and self.device is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)


@contextmanager
def replayed(state: RandomState, like: Tensor) -> Iterator[None]:
    """Within it, random numbers come again from `state`; after it, they go on as if nothing was.

    `like`: a tensor where the ops run.
    """
    outer = RandomState.now(like)
    state.use()
    try:
        yield
    finally:
        outer.use()


class _Tiled(torch.autograd.Function):
    """`function` of rows; its weights are inputs of their own."""

    @staticmethod
    def forward(
        ctx: Any, function: RowFunction, tile: int, num_inputs: int, *tensors: Tensor
    ) -> Tensor:
        ctx.function, ctx.tile, ctx.num_inputs = function, tile, num_inputs
        ctx.save_for_backward(*tensors)
        ctx.random = RandomState.now(tensors[0])
        return forward_tiles(function, tensors[:num_inputs], tile)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        inputs, weights = ctx.saved_tensors[: ctx.num_inputs], ctx.saved_tensors[ctx.num_inputs :]
        sums = WeightSums(weights)
        with replayed(ctx.random, grad):
            found = backward_tiles(ctx.function, inputs, grad, ctx.tile, sums)
        return (None, None, None, *found, *sums.take())


def tiled(
    function: RowFunction, inputs: Sequence[Tensor], weights: Sequence[nn.Parameter], tile: int
) -> Tensor:
    """function(*inputs) in tiles; `weights` are those it uses and trains."""
    apply: Any = _Tiled.apply
    out: Tensor = apply(function, tile, len(inputs), *inputs, *weights)
    return out
