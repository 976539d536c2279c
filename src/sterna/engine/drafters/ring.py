"""What was served, as rows to learn from: a hidden state and the tokens that followed it.

A bounded ring in memory, written by the engine's thread and read by the learner's. It holds users'
text: it is off unless asked for, never written to disk, and gone with the process. Every eighth
sequence goes to a ring of its own, on which nothing is trained.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from sterna.engine.sequence import Sequence

HELD_OUT_EVERY: Final = 8


class Ring:
    """The last `size` rows: hidden [size, D], tokens [size, width] int32."""

    def __init__(self, size: int, hidden_size: int, width: int, dtype: torch.dtype) -> None:
        self._hidden = torch.zeros(size, hidden_size, dtype=dtype)
        self._tokens = torch.zeros(size, width, dtype=torch.int32)
        self._lock = threading.Lock()
        self.num_added = 0

    def __len__(self) -> int:
        return min(self.num_added, len(self._hidden))

    def add(self, hidden: Tensor, tokens: Seq[int]) -> None:
        """One row; the oldest makes room."""
        with self._lock:
            at = self.num_added % len(self._hidden)
            self._hidden[at] = hidden
            self._tokens[at] = torch.tensor(tokens, dtype=torch.int32)
            self.num_added += 1

    def take(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `at` in float32, and their tokens; copies."""
        with self._lock:
            return self._hidden[at].float(), self._tokens[at]

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` rows drawn with replacement."""
        return self.take(torch.randint(len(self), (count,), generator=generator))

    def newest(self, count: int) -> tuple[Tensor, Tensor]:
        """The last `count` rows, or fewer."""
        count, size = min(count, len(self)), len(self._hidden)
        return self.take((self.num_added - 1 - torch.arange(count)) % size)


@dataclass(slots=True)
class _Open:
    """Rows of a sequence whose following tokens are not all known yet."""

    ring: Ring
    rows: list[tuple[int, Tensor]] = field(default_factory=list)  # (place in the output, state)


class Recorder:
    """Turns what an engine commits into rows. Engine thread only."""

    def __init__(self, train: Ring, held_out: Ring, num_drafts: int) -> None:
        self._rings = (train, held_out)
        self._num_drafts = num_drafts
        self._open: dict[Sequence, _Open] = {}
        self._num_seqs = 0

    def observe(self, seq: Sequence, hidden: Tensor) -> None:
        """The states [t, D] of tokens that `seq.output` already ends with."""
        track = self._open.get(seq)
        if track is None:
            self._num_seqs += 1
            track = self._open[seq] = _Open(self._rings[self._num_seqs % HELD_OUT_EVERY == 0])
        first = len(seq.output) - len(hidden)
        track.rows.extend((first + i, row) for i, row in enumerate(hidden.clone()))
        while track.rows and track.rows[0][0] + self._num_drafts < len(seq.output):
            place, row = track.rows.pop(0)
            track.ring.add(row, seq.output[place : place + self._num_drafts + 1])

    def finish(self, seq: Sequence) -> None:
        """Rows that nothing will follow are dropped."""
        self._open.pop(seq, None)
