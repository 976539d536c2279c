"""Switches a decoder to long rows: `apply_longseq(decoder, settings)`.

Checkpoints of one block replace that block's `forward`, so that FSDP2's hooks around it stay.
Checkpoints of several blocks span modules, which FSDP2 gathers one at a time: refused together.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sterna.core.errors import ConfigError
from sterna.model.batch import Batch
from sterna.model.decoder import Decoder
from sterna.model.hf import HFDecoder
from sterna.model.layers import Block
from sterna.train.longseq.blocks import LongBlock, checkpointed
from sterna.train.longseq.config import LongseqSection
from sterna.train.longseq.foreign import apply_foreign
from sterna.train.longseq.store import DiskStore, HostStore, MemoryStore, Store
from sterna.train.offload.weights import OffloadedBlock, WeightTier, posed


def apply_longseq(
    decoder: Decoder | HFDecoder,
    settings: LongseqSection,
    folder: Path | None = None,
    is_sharded: bool = False,
    weights: WeightTier | None = None,
) -> None:
    """Train `decoder` in the memory `settings` allow. Values are those of the plain forward.

    `folder`: where tier disk writes when the settings name none. `is_sharded`: FSDP2 holds the
    weights, or will: call it before FSDP2 wraps the blocks. `weights`: moves the blocks' weights,
    which needs checkpoints and a native model. Raises ConfigError for combinations and
    UnsupportedModelError for models behind transformers that cannot be proven.
    """
    if is_sharded and settings.every > 1:
        raise ConfigError(
            f"longseq.every = {settings.every} spans blocks that FSDP2 gathers one at a time; "
            "use longseq.every = 1 with more than one data rank",
            param="longseq.every",
        )
    store = new_store(settings, decoder.device, folder)
    if isinstance(decoder, HFDecoder):
        apply_foreign(decoder, settings, store)
        return
    blocks = [LongBlock(block, settings, store) for block in _blocks(decoder)]
    if weights is not None:
        assert settings.checkpoint
        blocks = [
            OffloadedBlock(one.block, settings, store, weights, i) for i, one in enumerate(blocks)
        ]
    if settings.checkpoint and settings.every > 1:
        decoder.walk = Segments(blocks, settings.every)
        return
    if settings.checkpoint or settings.mlp_tile or settings.attention_tile:
        for block in blocks:
            block.block.forward = types.MethodType(_forward_of(block), block.block)


def new_store(settings: LongseqSection, device: torch.device, folder: Path | None) -> Store:
    """The store of the settings' tier. ConfigError for disk without a folder."""
    if settings.tier == "host":
        return HostStore(device)
    if settings.tier == "memory":
        return MemoryStore()
    place = settings.folder or folder
    if place is None:
        raise ConfigError(
            "longseq.tier = 'disk' needs a folder; set longseq.folder", param="longseq.folder"
        )
    return DiskStore(place)


def _blocks(decoder: Decoder) -> list[Block]:
    return [block for block in decoder.layers if isinstance(block, Block)]


def _forward_of(block: LongBlock) -> Any:
    def forward(
        self: Block, h: Tensor, batch: Batch, table: Tensor | None, rows: Tensor | None
    ) -> Tensor:
        if batch.kv is not None or rows is not None:
            return Block.forward(self, h, batch, table, rows)
        if not block.settings.checkpoint:
            return block.in_tiles(h, batch, table)
        with posed([block]):
            return checkpointed([block], h, batch, [table])

    return forward


class Segments:
    """Walks the blocks of a decoder, one checkpoint a segment."""

    def __init__(self, blocks: list[LongBlock], every: int) -> None:
        self._segments = [blocks[i : i + every] for i in range(0, len(blocks), every)]

    def __call__(self, decoder: Decoder, h: Tensor, batch: Batch) -> Tensor | None:
        """The last block's output; None for a batch that is not trained on."""
        if batch.kv is not None or batch.output_rows is not None:
            return None
        at = 0
        for segment in self._segments:
            tables = [decoder.rope_of(i) for i in range(at, at + len(segment))]
            with posed(segment):
                h = checkpointed(segment, h, batch, tables)
            at += len(segment)
        return h
