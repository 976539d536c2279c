"""Rows cut along the sequence for the sp ranks.

Targets are shifted before the cut (packed rows hold the next token of the same document), so the
last token of a shard keeps its target. Tokens, positions and targets become the rank's slice; the
document borders stay those of the whole row, which attention needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sterna.core.errors import ConfigError
from sterna.parallel.mesh import Axis
from sterna.parallel.ring import chunk_sizes

IGNORE = -100
B = TypeVar("B")  # a flat batch; a type variable since parallel/ lies below model/


def chunk_of(total: int, axis: Axis) -> slice:
    """The tokens of a row of `total` that this rank holds."""
    sizes = chunk_sizes(total, axis.size)
    begin = sum(sizes[: axis.rank])
    return slice(begin, begin + sizes[axis.rank])


def shard_batch(batch: B, targets: Tensor, axis: Axis) -> tuple[B, Tensor]:
    """This rank's slice of a training batch (kv=None, all rows) and of its targets [T].

    Raises ConfigError for fewer tokens than ranks: a rank without tokens has nothing to run.
    """
    if axis.size == 1:
        return batch, targets
    total = targets.shape[0]
    if total < axis.size:
        raise ConfigError(
            f"a row of {total} tokens cannot be cut over {axis.size} sp ranks; give longer rows "
            "(data.seq_len) or a smaller parallel.sp"
        )
    flat: Any = batch
    assert flat.kv is None and flat.output_rows is None
    part = chunk_of(total, axis)
    return replace(flat, tokens=flat.tokens[part], positions=flat.positions[part]), targets[part]


@dataclass(frozen=True, slots=True)
class FlatRow:
    """A flat training row as tensors: what a padded [b, s] batch of dictionaries becomes."""

    tokens: Tensor  # [T] int32
    positions: Tensor  # [T] int32
    targets: Tensor  # [T] int64, already shifted
    starts: Tensor  # [D + 1] int32, of the whole row


class SequenceShards:
    """Any loader of `input_ids [b, s]` dictionaries, cut along the sequence.

    The sp group's first rank reads and sends every other rank its slice, so each sample is read
    and tokenised once a group and no seeds have to agree. `labels`, `position_ids` and
    `attention_mask` are used where a batch has them: padding is dropped, positions that do not go
    on by one start a document, labels are shifted within documents.
    """

    def __init__(self, loader: Iterable[Mapping[str, Any]], axis: Axis) -> None:
        self._loader = loader
        self._axis = axis

    def __iter__(self) -> Iterator[FlatRow]:
        """This rank's slice of each batch; ConfigError for batches shorter than the axis."""
        axis = self._axis
        if axis.size == 1:
            yield from (flatten(batch) for batch in self._loader)
            return
        source = iter(self._loader) if axis.rank == 0 else None
        while (row := self._next(source)) is not None:
            yield row

    def _next(self, source: Iterator[Mapping[str, Any]] | None) -> FlatRow | None:
        axis = self._axis
        shards: list[Any] | None = None
        if source is not None:
            batch = next(source, None)
            none: list[Any] = [None] * axis.size
            shards = none if batch is None else _cut(flatten(batch), axis)
        received: list[Any] = [None]
        dist.scatter_object_list(received, shards, src=axis.ranks[0], group=axis.group)
        if isinstance(received[0], ConfigError):
            raise received[0]
        row: FlatRow | None = received[0]
        return row


def flatten(batch: Mapping[str, Any]) -> FlatRow:
    """A padded batch as one flat row; rows of the batch become documents of their own."""
    tokens = torch.as_tensor(batch["input_ids"])
    labels = torch.as_tensor(batch.get("labels", tokens))
    positions = batch.get("position_ids")
    default = torch.arange(tokens.shape[1]).expand_as(tokens)
    places = default if positions is None else torch.as_tensor(positions)
    mask = batch.get("attention_mask")
    kept = torch.ones_like(tokens) if mask is None else torch.as_tensor(mask)
    keep = kept.bool()
    row_idx = torch.arange(tokens.shape[0])[:, None].expand_as(tokens)
    places = places.expand_as(tokens)[keep]
    return _documents(tokens[keep], labels[keep], places, row_idx[keep], positions is None)


def _documents(
    tokens: Tensor, labels: Tensor, positions: Tensor, row_idx: Tensor, restart: bool
) -> FlatRow:
    is_new = torch.ones(tokens.shape[0], dtype=torch.bool)
    is_new[1:] = (positions[1:] != positions[:-1] + 1) | (row_idx[1:] != row_idx[:-1])
    starts = [*is_new.nonzero().flatten().tolist(), tokens.shape[0]]
    if restart:  # left padding: a row's own first position is 0
        spans = itertools.pairwise(starts)
        positions = torch.cat([torch.arange(b - a) for a, b in spans] or [positions])
    targets = torch.full_like(labels, IGNORE)
    targets[:-1] = labels[1:].masked_fill(is_new[1:], IGNORE)
    borders = torch.tensor(starts, dtype=torch.int32)
    return FlatRow(tokens.int(), positions.int(), targets.long(), borders)


def _cut(row: FlatRow, axis: Axis) -> list[Any]:
    total = row.tokens.shape[0]
    if total < axis.size:
        error = ConfigError(f"a batch of {total} tokens cannot be cut over {axis.size} sp ranks")
        return [error] * axis.size
    bounds = list(itertools.accumulate(chunk_sizes(total, axis.size), initial=0))
    return [
        FlatRow(row.tokens[a:b], row.positions[a:b], row.targets[a:b], row.starts)
        for a, b in itertools.pairwise(bounds)
    ]
