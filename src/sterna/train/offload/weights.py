"""The blocks' weights away from the device: the next block arrives while one computes.

A block's tensors point home (`data` is the tensor in the file or in pinned memory), so whoever
saves, averages or merges weights finds them; within `resident` they point into one of two buffers.
The walk goes up in the forward and down in the backward, so the next block is known. Weights change
between passes alone, and a pass begins at block 0: that is where buffers are forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sterna.core.errors import ConfigError
from sterna.model.batch import Batch
from sterna.train.longseq.blocks import LongBlock
from sterna.train.longseq.config import LongseqSection
from sterna.train.longseq.store import Store
from sterna.train.longseq.tiles import RandomState
from sterna.train.offload.homes import Kept, Piece, TierHome, cut, fetch, num_bytes
from sterna.train.offload.lanes import Ticket

LEAST = 4096  # numbers: smaller tensors stay, each would cost a read of its own


@dataclass(frozen=True, slots=True)
class Held:
    """An offloaded tensor."""

    tensor: Tensor  # the Parameter or buffer of the module
    kept: Kept
    at_home: Tensor  # in its own shape


@dataclass(slots=True)
class _Buffer:
    """Room for a block's tensors; `ticket` says when block `block_idx` is in it."""

    memory: Tensor
    block_idx: int = -1
    ticket: Ticket = None


class WeightTier:
    """Moves the weights of `blocks`: those that `is_wanted` picks of parameters and buffers."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        home: TierHome,
        is_wanted: Callable[[Tensor], bool],
    ) -> None:
        """Moves them home. ConfigError when there is none, TrainError when there is no room."""
        self._home = home
        self._is_far = home.device.type != "cpu"
        shared = _shared(blocks)
        self._held = [
            [hold(t, home) for t in _tensors(b) if id(t) not in shared and is_wanted(t)]
            for b in blocks
        ]
        if not any(self._held):
            raise ConfigError(
                "offload.weights finds nothing to offload in the blocks; set it to memory",
                param="offload.weights",
            )
        self._pieces = [_piece(held) for held in self._held]
        self.num_bytes = max(num_bytes(piece) for piece in self._pieces)  # of the largest block
        self._buffers: list[_Buffer] = []

    @property
    def places(self) -> Mapping[nn.Parameter, Kept]:
        """Where each offloaded parameter lives."""
        held = (one for block in self._held for one in block)
        return {one.tensor: one.kept for one in held if isinstance(one.tensor, nn.Parameter)}

    @contextmanager
    def resident(self, block_idx: int, next_idx: int) -> Iterator[None]:
        """Within it the block's weights are on the device; `next_idx` is on its way."""
        if block_idx == 0 and next_idx > 0:
            self._forget()
        buffer = self._load(block_idx, keep=-1)
        if 0 <= next_idx < len(self._held):
            self._load(next_idx, keep=block_idx)
        self._home.lane.wait(buffer.ticket)
        tensors = cut(self._pieces[block_idx], buffer.memory)
        for name, one in enumerate(self._held[block_idx]):
            one.tensor.data = tensors[str(name)].view(one.at_home.shape)
        try:
            yield
        finally:
            self._leave(block_idx)

    @contextmanager
    def posed(self, blocks: Sequence[int]) -> Iterator[None]:
        """Within it the weights look as if they were on the device: autograd notes where gradients
        will be before the blocks run. Nothing to do where home is the device's own memory."""
        for one in (one for i in blocks for one in self._held[i] if self._is_far):
            stand_in = torch.empty(1, dtype=one.at_home.dtype, device=self._home.device)
            one.tensor.data = stand_in.expand(one.at_home.shape)
        try:
            yield
        finally:
            for i in blocks:
                self._leave(i)

    def release(self) -> None:
        """Between passes: give the buffers' memory back; the next pass takes it again."""
        self._home.lane.finish()
        self._buffers = []
        self._home.drop()

    def _leave(self, block_idx: int) -> None:
        for one in self._held[block_idx]:
            one.tensor.data = one.at_home

    def _load(self, block_idx: int, keep: int) -> _Buffer:
        """The buffer that has or gets the block; not the one of block `keep`."""
        if not self._buffers:
            empty = partial(torch.empty, self.num_bytes, dtype=torch.uint8)
            self._buffers = [_Buffer(empty(device=self._home.device)) for _ in range(2)]
        for buffer in self._buffers:
            if buffer.block_idx == block_idx:
                return buffer
        buffer = next(b for b in self._buffers if b.block_idx != keep or keep < 0)
        buffer.block_idx = block_idx
        piece = self._pieces[block_idx]
        buffer.ticket = self._home.lane.run(partial(fetch, piece, cut(piece, buffer.memory)))
        return buffer

    def _forget(self) -> None:
        self._home.drop()
        for buffer in self._buffers:
            buffer.block_idx = -1


class OffloadedBlock(LongBlock):
    """A block whose weights come for its forward and for its backward."""

    __slots__ = ("index", "tier")

    def __init__(
        self,
        block: nn.Module,
        settings: LongseqSection,
        store: Store,
        tier: WeightTier,
        index: int,
    ) -> None:
        super().__init__(block, settings, store)
        self.tier, self.index = tier, index

    def run(self, h: Tensor, batch: Batch | None, table: Any) -> Tensor:
        """See LongBlock."""
        with self.tier.resident(self.index, self.index + 1):
            return LongBlock.run(self, h, batch, table)

    def backward(
        self, h: Tensor, batch: Batch | None, table: Any, grad: Tensor, random: RandomState
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """See LongBlock."""
        with self.tier.resident(self.index, self.index - 1):
            return LongBlock.backward(self, h, batch, table, grad, random)


@contextmanager
def posed(blocks: Sequence[LongBlock]) -> Iterator[None]:
    """`WeightTier.posed` of those blocks that are offloaded; all are, or none."""
    away = [block for block in blocks if isinstance(block, OffloadedBlock)]
    if not away:
        yield
        return
    with away[0].tier.posed([block.index for block in away]):
        yield


def _tensors(block: nn.Module) -> list[Tensor]:
    return [*block.parameters(), *block.buffers()]


def _shared(blocks: Sequence[nn.Module]) -> set[int]:
    """Tensors of more than one block: they stay."""
    seen: set[int] = set()
    twice: set[int] = set()
    for block in blocks:
        own = {id(t) for t in _tensors(block)}
        twice |= own & seen
        seen |= own
    return twice


def hold(tensor: Tensor, home: TierHome) -> Held:
    """Move a tensor home: its `data` is there from now on. TrainError when there is no room."""
    flat = tensor.detach().contiguous().reshape(-1)
    kept = home.new(flat.numel(), flat.dtype, flat.device)
    kept.write(slice(0, flat.numel()), flat)  # not through the map, whose pages would stay
    at_home = kept.tensor.view(tensor.shape)
    tensor.data = at_home
    return Held(tensor, kept, at_home)


def _piece(held: list[Held]) -> Piece:
    """Everything of a block, by its number."""
    return {str(i): (one.kept, slice(0, one.tensor.numel())) for i, one in enumerate(held)}
