"""Documents side by side in rows of up to `seq_len` tokens: no padding, no cut at a row's edge.

Best-fit-decreasing (Johnson 1973; for training rows: Ding et al. 2024, arXiv 2404.10830): the
longest document first, each into the fullest row that still has room. Its worst case is 11/9 of
the optimum, and a window of chats fills rows above 99 %. `greedy` keeps the stream's order: a row
ends where the next document does not fit.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
# The target of a position that is not trained, as in torch's cross_entropy.
IGNORE = -100
# The source of the filler row that keeps ranks in step when the data end (see `filler`).
NO_SOURCE = -1


# The borders of a document that is one sequence.
WHOLE = np.zeros(1, np.int32)
WHOLE.flags.writeable = False


@dataclass(frozen=True, slots=True)
class Document:
    """One tokenised document of n tokens, already shifted.

    `tokens` int32 [n]; `targets` int32 [n]: the document's next token where it is trained, else
    IGNORE; `source` is the index of its source in the settings; `place` its file and line or row.
    It may hold several sequences that are only of use together (two answers to compare): `borders`
    int32 are their starts, the first of which is 0, and `note` is what the row says of them (a
    margin, a label).
    """

    tokens: Ints
    targets: Ints
    source: int
    place: str = ""
    borders: Ints = field(default_factory=lambda: WHOLE)
    note: float = 0.0


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One training row of T tokens: D documents of S >= D sequences side by side, no padding.

    `tokens` int32 [T]; `targets` int32 [T], already shifted, never across sequences, IGNORE where
    not trained; `positions` int32 [T], from 0 in every sequence; `starts` int32 [S + 1], the
    borders (starts[0] = 0, starts[-1] = T); `sources`, of each document (NO_SOURCE = filler);
    `counts` and `notes`, its number of sequences and its note (empty: one sequence each, no note);
    `places`, of each document, as `chats.jsonl:17`, for messages.
    """

    tokens: Ints
    targets: Ints
    positions: Ints
    starts: Ints
    sources: tuple[int, ...]
    places: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    notes: tuple[float, ...] = ()

    @property
    def num_targets(self) -> int:
        """Positions that are trained."""
        return int(np.count_nonzero(self.targets != IGNORE))


def join(documents: Sequence[Document]) -> PackedRow:
    """The documents, in this order, as one row."""
    ends = np.cumsum([0, *(len(document.tokens) for document in documents)], dtype=np.int32)
    inner = [d.borders + at for d, at in zip(documents, ends[:-1], strict=True)]
    starts = np.concatenate([*inner, ends[-1:]]).astype(np.int32)
    return PackedRow(
        tokens=np.concatenate([document.tokens for document in documents]),
        targets=np.concatenate([document.targets for document in documents]),
        positions=np.arange(ends[-1], dtype=np.int32) - np.repeat(starts[:-1], np.diff(starts)),
        starts=starts,
        sources=tuple(document.source for document in documents),
        places=tuple(document.place for document in documents),
        counts=tuple(len(document.borders) for document in documents),
        notes=tuple(document.note for document in documents),
    )


def documents_of(row: PackedRow) -> list[Document]:
    """The documents of a row again, without fillers."""
    counts = row.counts or (1,) * len(row.sources)
    notes = row.notes or (0.0,) * len(row.sources)
    places = row.places or ("",) * len(row.sources)
    found, at = [], 0
    for source, count, note, place in zip(row.sources, counts, notes, places, strict=True):
        borders = row.starts[at : at + count]
        part = slice(int(borders[0]), int(row.starts[at + count]))
        at += count
        if source != NO_SOURCE:
            tokens, targets = row.tokens[part], row.targets[part]
            found.append(Document(tokens, targets, source, place, borders - borders[0], note))
    return found


def sequences_of(document: Document) -> list[Document]:
    """Each sequence of a document as one of its own."""
    ends = [*document.borders.tolist(), len(document.tokens)]
    return [
        replace(document, tokens=document.tokens[a:b], targets=document.targets[a:b], borders=WHOLE)
        for a, b in pairwise(ends)
    ]


def filler() -> PackedRow:
    """A row that trains nothing: one token without a target.

    A rank gets it when the data end in the middle of a round of ranks, so that every rank makes
    the same number of steps. With the loss normalised by the global count it changes nothing.
    """
    return join([Document(np.zeros(1, np.int32), np.full(1, IGNORE, np.int32), NO_SOURCE)])


def best_fit(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Rows as lists of indices into `lengths`; every index once, a row's sum at most `seq_len`.

    Rows are ordered by their first document and documents inside a row by index, so the stream's
    order survives as far as packing allows.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size = lengths[index]
        at = bisect_left(rooms, (size, -1))
        if at < len(rooms):
            room, row = rooms.pop(at)
            rows[row].append(index)
        else:
            room, row = seq_len, len(rows)
            rows.append([index])
        if room > size:
            insort(rooms, (room - size, row))
    return sorted(sorted(row) for row in rows)


def greedy(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Rows in the stream's order; a row ends where the next document does not fit."""
    rows: list[list[int]] = []
    free = 0
    for index, size in enumerate(lengths):
        if size > free:
            rows.append([])
            free = seq_len
        rows[-1].append(index)
        free -= size
    return rows


def one_each(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """A row a document."""
    return [[index] for index in range(len(lengths))]


PACKERS = {"best_fit": best_fit, "greedy": greedy, "none": one_each}


def pack(documents: Sequence[Document], seq_len: int, method: str) -> list[PackedRow]:
    """The documents as rows; each must have at most `seq_len` tokens."""
    lengths = [len(document.tokens) for document in documents]
    assert max(lengths, default=0) <= seq_len, "a document is longer than a row"
    return [join([documents[i] for i in row]) for row in PACKERS[method](lengths, seq_len)]
