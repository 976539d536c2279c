"""A decoder block in little memory: its backward by hand, in tiles, from one saved row a token.

    forward    h -> front (norm, qkv, rotation) -> attention -> back (out, residual, norm, MLP)
    kept       h, in the tier of the settings
    backward   front again (tiles)            qkv        1.7 rows of h a token (8 of 32 key heads)
               attention again                o          1
               back, tile by tile             d_o, d_h   1 + 1; runs once: its output is not needed,
                                              so a tile is computed as it is differentiated
               attention                      d_qkv      1.7
               front, tile by tile            adds to d_h

With h and the upstream gradient that is some 7 rows at once (a row: hidden_size numbers a token);
plain checkpointing holds 13 and runs the MLP forward three times, this twice.

A block stays the module that FSDP2 wrapped: only its `forward` is replaced, so weights are
gathered and gradients scattered as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sterna.model.batch import Batch
from sterna.model.layers import Block
from sterna.train.longseq.config import LongseqSection
from sterna.train.longseq.store import Store
from sterna.train.longseq.tiles import (
    RandomState,
    RowFunction,
    WeightSums,
    backward_tiles,
    forward_tiles,
    replayed,
    tiled,
)


class Halves(Protocol):
    """A block on one row of T tokens: two functions of rows around its attention."""

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """What both halves read of a token beside its hidden row: integers [T]."""
        ...

    def front(self, h: Tensor, *rows: Tensor) -> Tensor:
        """h [t, D] -> rotated qkv [t, (H + 2G) * C]."""
        ...

    def attend(self, qkv: Tensor) -> Tensor:
        """qkv of all T tokens -> [T, H * C]."""
        ...

    def back(self, h: Tensor, o: Tensor, *rows: Tensor) -> Tensor:
        """h [t, D] and the attention output [t, H * C] -> the block's output [t, D]."""
        ...


@dataclass(frozen=True, slots=True)
class NativeHalves:
    """Those of a native block. See Halves."""

    block: Block
    batch: Batch
    table: Tensor | None

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """See Halves."""
        return (self.batch.positions,)

    def front(self, h: Tensor, *rows: Tensor) -> Tensor:
        """See Halves."""
        return self.block.attn.project(self.block.attn_norm(h), rows[0], self.table)

    def attend(self, qkv: Tensor) -> Tensor:
        """See Halves."""
        return self.block.attn.attend(qkv, self.batch.query_starts)

    def back(self, h: Tensor, o: Tensor, *rows: Tensor) -> Tensor:
        """See Halves."""
        return self.block.finish(h, o)


@dataclass(slots=True)
class LongBlock:
    """One block's way through a row."""

    block: nn.Module
    settings: LongseqSection
    store: Store

    def halves(self, batch: Batch | None, table: Any) -> Halves:
        """The block on a batch; `table`: what this block alone is given, here its rope table."""
        assert isinstance(self.block, Block) and batch is not None
        return NativeHalves(self.block, batch, table)

    def weights(self) -> list[nn.Parameter]:
        """The block's trained weights, in order."""
        return [p for p in self.block.parameters() if p.requires_grad]

    def run(self, h: Tensor, batch: Batch | None, table: Any) -> Tensor:
        """The forward, nothing recorded."""
        halves = self.halves(batch, table)
        qkv = forward_tiles(halves.front, (h, *halves.rows), self.settings.attention_tile)
        with torch.no_grad():
            o = halves.attend(qkv)
        del qkv
        return forward_tiles(halves.back, (h, o, *halves.rows), self.settings.mlp_tile)

    def backward(
        self, h: Tensor, batch: Batch | None, table: Any, grad: Tensor, random: RandomState
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """(gradient of h, gradients of `weights()`) from the block's input and the upstream one.

        `random`: where the random numbers stood before the block ran.
        """
        sums, halves = WeightSums(self.weights()), self.halves(batch, table)
        rows, tile = (h, *halves.rows), self.settings.attention_tile
        with replayed(random, h):
            qkv = forward_tiles(halves.front, rows, tile)
            d_h, d_qkv = self._backward_attention(h, halves, qkv, grad, sums)
        del qkv
        with replayed(random, h):
            found = backward_tiles(halves.front, rows, d_qkv, tile, sums)[0]
        assert found is not None
        return d_h.add_(found), sums.take()

    def _backward_attention(
        self, h: Tensor, halves: Halves, qkv: Tensor, grad: Tensor, sums: WeightSums
    ) -> tuple[Tensor, Tensor]:
        """Back half and attention: (gradient of h through the residual, of qkv)."""
        qkv = qkv.requires_grad_()
        with torch.enable_grad():
            o = halves.attend(qkv)
        rows = (h, o.detach(), *halves.rows)
        d_h, d_o, *_ = backward_tiles(halves.back, rows, grad, self.settings.mlp_tile, sums)
        assert d_h is not None and d_o is not None
        (d_qkv,) = torch.autograd.grad(o, qkv, d_o)
        return d_h, d_qkv

    def in_tiles(self, h: Tensor, batch: Batch | None, table: Any) -> Tensor:
        """The forward without a checkpoint: each tiled half keeps its inputs."""
        weights, halves = self.weights(), self.halves(batch, table)
        qkv = _half(halves.front, (h, *halves.rows), weights, self.settings.attention_tile)
        o = halves.attend(qkv)
        return _half(halves.back, (h, o, *halves.rows), weights, self.settings.mlp_tile)


def _half(
    function: RowFunction, rows: tuple[Tensor, ...], weights: list[nn.Parameter], tile: int
) -> Tensor:
    return tiled(function, rows, weights, tile) if tile else function(*rows)


class _Checkpoint(torch.autograd.Function):
    """Blocks from one saved input. `weights` are inputs, so that autograd takes their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: Sequence[LongBlock],
        h: Tensor,
        batch: Batch | None,
        tables: list[Any],
        *weights: Tensor,
    ) -> Tensor:
        ctx.blocks, ctx.batch, ctx.tables = blocks, batch, tables
        ctx.random = RandomState.now(h)
        ctx.kept = blocks[0].store.put(h)
        return _run(blocks, h, batch, tables)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        blocks: Sequence[LongBlock] = ctx.blocks
        inputs, states = _inputs(ctx)
        found: list[tuple[Tensor | None, ...]] = []
        for i in reversed(range(len(blocks))):
            h = inputs.pop()
            grad, own = blocks[i].backward(h, ctx.batch, ctx.tables[i], grad, states[i])
            found.insert(0, own)
        return (None, grad, None, None, *(g for own in found for g in own))


def _run(blocks: Sequence[LongBlock], h: Tensor, batch: Batch | None, tables: list[Any]) -> Tensor:
    for block, table in zip(blocks, tables, strict=True):
        h = block.run(h, batch, table)
    return h


def _inputs(ctx: Any) -> tuple[list[Tensor], list[RandomState]]:
    """The input of every block, and the state of the random numbers it began with."""
    blocks: Sequence[LongBlock] = ctx.blocks
    h = blocks[0].store.take(ctx.kept)
    inputs, states = [h], [ctx.random]
    with replayed(ctx.random, h):
        for block, table in zip(blocks[:-1], ctx.tables[:-1], strict=True):
            h = block.run(h, ctx.batch, table)
            inputs.append(h)
            states.append(RandomState.now(h))
    return inputs, states


def checkpointed(
    blocks: Sequence[LongBlock], h: Tensor, batch: Batch | None, tables: list[Any]
) -> Tensor:
    """The blocks in a row, h [T, D] -> [T, D]."""
    weights = [w for block in blocks for w in block.weights()]
    if not torch.is_grad_enabled() or not (h.requires_grad or weights):
        return _run(blocks, h, batch, tables)
    apply: Any = _Checkpoint.apply
    out: Tensor = apply(blocks, h, batch, tables, *weights)
    return out
