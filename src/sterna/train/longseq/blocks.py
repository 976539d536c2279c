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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sterna.model.batch import Batch
from sterna.model.layers import Block
from sterna.train.longseq.config import LongseqSection
from sterna.train.longseq.store import Store
from sterna.train.longseq.tiles import (
    RandomState,
    WeightSums,
    backward_tiles,
    forward_tiles,
    replayed,
    tiled,
)


@dataclass(slots=True)
class LongBlock:
    """One block's way through a row."""

    block: Block
    settings: LongseqSection
    store: Store

    def front(self, h: Tensor, positions: Tensor, table: Tensor | None) -> Tensor:
        """h [T, D] -> rotated qkv."""
        return self.block.attn.project(self.block.attn_norm(h), positions, table)

    def weights(self) -> list[nn.Parameter]:
        """The block's trained weights, in order."""
        return [p for p in self.block.parameters() if p.requires_grad]

    def run(self, h: Tensor, batch: Batch, table: Tensor | None) -> Tensor:
        """The forward, nothing recorded."""
        qkv = forward_tiles(
            self._front_of(table), (h, batch.positions), self.settings.attention_tile
        )
        with torch.no_grad():
            o = self.block.attn.attend(qkv, batch.query_starts)
        del qkv
        return forward_tiles(self.block.finish, (h, o), self.settings.mlp_tile)

    def backward(
        self, h: Tensor, batch: Batch, table: Tensor | None, grad: Tensor, random: RandomState
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """(gradient of h, gradients of `weights()`) from the block's input and the upstream one.

        `random`: where the random numbers stood before the block ran.
        """
        sums = WeightSums(self.weights())
        front, rows = self._front_of(table), (h, batch.positions)
        with replayed(random, h):
            qkv = forward_tiles(front, rows, self.settings.attention_tile)
            d_h, d_qkv = self._backward_attention(h, batch, qkv, grad, sums)
        del qkv
        with replayed(random, h):
            found = backward_tiles(front, rows, d_qkv, self.settings.attention_tile, sums)[0]
        assert found is not None
        return d_h.add_(found), sums.take()

    def _backward_attention(
        self, h: Tensor, batch: Batch, qkv: Tensor, grad: Tensor, sums: WeightSums
    ) -> tuple[Tensor, Tensor]:
        """Back half and attention: (gradient of h through the residual, of qkv)."""
        qkv = qkv.requires_grad_()
        with torch.enable_grad():
            o = self.block.attn.attend(qkv, batch.query_starts)
        tile = self.settings.mlp_tile
        d_h, d_o = backward_tiles(self.block.finish, (h, o.detach()), grad, tile, sums)
        assert d_h is not None and d_o is not None
        (d_qkv,) = torch.autograd.grad(o, qkv, d_o)
        return d_h, d_qkv

    def _front_of(self, table: Tensor | None) -> Callable[..., Tensor]:
        return lambda h, positions: self.front(h, positions, table)

    def in_tiles(self, h: Tensor, batch: Batch, table: Tensor | None) -> Tensor:
        """The forward without a checkpoint: each tiled half keeps its inputs."""
        weights = self.weights()
        tile = self.settings.attention_tile
        if tile:
            qkv = tiled(self._front_of(table), (h, batch.positions), weights, tile)
        else:
            qkv = self.front(h, batch.positions, table)
        o = self.block.attn.attend(qkv, batch.query_starts)
        if self.settings.mlp_tile:
            return tiled(self.block.finish, (h, o), weights, self.settings.mlp_tile)
        return self.block.finish(h, o)


class _Checkpoint(torch.autograd.Function):
    """Blocks from one saved input. `weights` are inputs, so that autograd takes their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: list[LongBlock],
        h: Tensor,
        batch: Batch,
        tables: list[Tensor | None],
        *weights: Tensor,
    ) -> Tensor:
        ctx.blocks, ctx.batch, ctx.tables = blocks, batch, tables
        ctx.random = RandomState.now(h)
        ctx.kept = blocks[0].store.put(h)
        return _run(blocks, h, batch, tables)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        blocks: list[LongBlock] = ctx.blocks
        inputs, states = _inputs(ctx)
        found: list[tuple[Tensor | None, ...]] = []
        for i in reversed(range(len(blocks))):
            h = inputs.pop()
            grad, own = blocks[i].backward(h, ctx.batch, ctx.tables[i], grad, states[i])
            found.insert(0, own)
        return (None, grad, None, None, *(g for own in found for g in own))


def _run(blocks: list[LongBlock], h: Tensor, batch: Batch, tables: list[Tensor | None]) -> Tensor:
    for block, table in zip(blocks, tables, strict=True):
        h = block.run(h, batch, table)
    return h


def _inputs(ctx: Any) -> tuple[list[Tensor], list[RandomState]]:
    """The input of every block, and the state of the random numbers it began with."""
    blocks: list[LongBlock] = ctx.blocks
    h = blocks[0].store.take(ctx.kept)
    inputs, states = [h], [ctx.random]
    with replayed(ctx.random, h):
        for block, table in zip(blocks[:-1], ctx.tables[:-1], strict=True):
            h = block.run(h, ctx.batch, table)
            inputs.append(h)
            states.append(RandomState.now(h))
    return inputs, states


def checkpointed(
    blocks: list[LongBlock], h: Tensor, batch: Batch, tables: list[Tensor | None]
) -> Tensor:
    """The blocks in a row, h [T, D] -> [T, D]."""
    weights = [w for block in blocks for w in block.weights()]
    if not torch.is_grad_enabled() or not (h.requires_grad or weights):
        return _run(blocks, h, batch, tables)
    apply: Any = _Checkpoint.apply
    out: Tensor = apply(blocks, h, batch, tables, *weights)
    return out
