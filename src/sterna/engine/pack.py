"""Whole texts -> one flat Batch without padding, and how many go into a step.

Nothing is padded, so sorting saves no arithmetic; texts of one length make the units of attention
equal, and a step of few tokens comes last, once, instead of anywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sterna.model.batch import Batch
from sterna.text.inputs import EncodedText

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Packed:
    """T tokens of S texts: ids [T], positions [T], starts [S + 1], all int32."""

    ids: Ints
    positions: Ints
    starts: Ints

    @property
    def num_seqs(self) -> int:
        """S."""
        return len(self.starts) - 1


def pack_arrays(texts: Sequence[EncodedText], rows_a_type: int = 0) -> Packed:
    """The arrays of a step. A token of type t stands `rows_a_type` * t rows later in the table of
    positions (see model/encoder.py)."""
    flat = itertools.chain.from_iterable
    lengths = np.fromiter(map(len, texts), np.int32, len(texts))
    starts = np.zeros(len(texts) + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    total = int(starts[-1])
    ids = np.fromiter(flat(text.ids for text in texts), np.int32, total)
    positions = np.arange(total, dtype=np.int32) - np.repeat(starts[:-1], lengths)
    if any(text.types is not None for text in texts):
        kinds = flat(text.types or (0,) * len(text) for text in texts)
        positions += np.fromiter(kinds, np.int32, total) * np.int32(rows_a_type)
    return Packed(ids, positions, starts)


def pack(
    sequences: Sequence[Sequence[int]],
    types: Sequence[Sequence[int]] | None = None,
    rows_a_type: int = 0,
) -> Batch:
    """The Batch of whole sequences, as `pack_arrays`."""
    kinds: Sequence[Sequence[int] | None] = types or [None] * len(sequences)
    texts = [EncodedText(ids, kind) for ids, kind in zip(sequences, kinds, strict=True)]
    packed = pack_arrays(texts, rows_a_type)
    starts = _tensor(packed.starts)
    return Batch(_tensor(packed.ids), _tensor(packed.positions), starts, starts[1:] - starts[:-1])


def plan_steps(lengths: Sequence[int], budget: int, max_seqs: int) -> list[list[int]]:
    """Indices of the texts of each step, the longest first; no step has more than `budget` tokens.

    A text longer than the budget is a step of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    steps: list[list[int]] = []
    room = 0
    for i in order:
        if not steps or lengths[i] > room or len(steps[-1]) == max_seqs:
            steps.append([])
            room = budget
        steps[-1].append(i)
        room -= lengths[i]
    return steps


def _tensor(values: Ints) -> Tensor:
    return torch.from_numpy(values)
