"""Answers side by side: the sequences of a pair or of a labelled answer as one document.

A pair is [prompt + chosen | prompt + rejected]. A labelled answer is [prompt + answer | prompt +
another row's answer]: KTO (arXiv 2402.01306) estimates from such mismatched answers how far the
policy is from its reference. The other row is the one before it among the rows read together, or
further back where the prompt is the same; without one there is only the first sequence.

What is too long is cut from the prompts' left, the longest first; an answer is never cut. The first
token stays where it is the tokenizer's BOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sterna.core.errors import DataError
from sterna.data.config import DataConfig
from sterna.data.counts import Counts
from sterna.data.pack import IGNORE, Document

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Whole:
    """A tokenised document of any length; arrays as in Document. `where` it stands, for errors."""

    tokens: Ints
    targets: Ints
    source: int
    where: str

    def place(self, at: int) -> str:
        """Where the piece from token `at` on comes from."""
        return f"{self.where} from token {at}" if at else self.where


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt of P >= 1 tokens, an answer of A >= 1, and the targets of the answer's tokens.

    `targets` int32 [A]: the answer's token where it is trained, else IGNORE; the first is trained.
    """

    prompt: Ints
    answer: Ints
    targets: Ints

    @property
    def size(self) -> int:
        """Tokens of both."""
        return len(self.prompt) + len(self.answer)


def as_exchange(tokens: Ints, targets: Ints) -> Exchange | None:
    """A tokenised sequence (targets shifted, as a Document's) parted before its first target.

    What follows the last target (a template's line break after the end-of-turn token) goes: the
    model never writes it, so a rollout that a reward model is asked about has none either. None
    where nothing is trained.
    """
    trained = np.flatnonzero(targets != IGNORE)
    if not len(trained):
        return None
    cut, end = int(trained[0]) + 1, int(trained[-1]) + 2
    return Exchange(tokens[:cut], tokens[cut:end], targets[cut - 1 : end - 1])


def mismatched(exchanges: Sequence[Exchange], at: int) -> Exchange | None:
    """The prompt of `at` with the answer of the row before it, or further, of another prompt."""
    own = exchanges[at]
    for back in range(1, len(exchanges)):
        other = exchanges[at - back]
        if not np.array_equal(own.prompt, other.prompt):
            return Exchange(own.prompt, other.answer, other.targets)
    return None


def fitted(
    exchanges: Sequence[Exchange], limit: int, each: int, bos: int | None
) -> list[Exchange] | None:
    """The exchanges with prompts short enough for `limit` tokens together and `each` for one.

    None where that is impossible: the answers alone are too long.
    """
    room = limit - sum(len(one.answer) for one in exchanges)
    longest = _longest(sorted(len(one.prompt) for one in exchanges), room)
    longest = min(longest, each - max(len(one.answer) for one in exchanges))
    if longest < 1 + (bos is not None):
        return None
    return [Exchange(_cut(one.prompt, longest, bos), one.answer, one.targets) for one in exchanges]


def _longest(sizes: list[int], room: int) -> int:
    """The largest p with sum(min(size, p)) <= room; sizes ascending."""
    for i, size in enumerate(sizes):
        share = room // (len(sizes) - i)
        if size > share:
            return share
        room -= size
    return sizes[-1]


def _cut(prompt: Ints, size: int, bos: int | None) -> Ints:
    if len(prompt) <= size:
        return prompt
    if bos is not None and prompt[0] == bos:
        return np.concatenate([prompt[:1], prompt[len(prompt) - size + 1 :]])
    return prompt[len(prompt) - size :]


def side_by_side(exchanges: Sequence[Exchange], whole: Whole, note: float) -> Document:
    """The exchanges as one document of as many sequences."""
    sizes = [one.size for one in exchanges]
    return Document(
        tokens=np.concatenate([part for one in exchanges for part in (one.prompt, one.answer)]),
        targets=np.concatenate([_shifted(one) for one in exchanges]),
        source=whole.source,
        place=whole.where,
        borders=np.cumsum([0, *sizes[:-1]], dtype=np.int32),
        note=note,
    )


def _shifted(one: Exchange) -> Ints:
    targets = np.full(one.size, IGNORE, np.int32)
    targets[len(one.prompt) - 1 : -1] = one.targets
    return targets


class Answers:
    """Makes documents of answers; see the module."""

    def __init__(self, data: DataConfig, bos: int | None, each: int) -> None:
        """`each`: tokens of one sequence at most; all of a document have data.seq_len."""
        self._data = data
        self._each = each
        self._bos = bos

    def documents(
        self, wholes: Sequence[Sequence[Whole]], notes: Sequence[float], counts: Counts
    ) -> list[Document]:
        """One document of each row read together, but for those that are left out and counted."""
        made = []
        rows = [(whole[0], self._exchanges(whole, counts)) for whole in wholes]
        kept = [(*row, note) for row, note in zip(rows, notes, strict=True) if row[1]]
        firsts = [exchanges[0] for _, exchanges, _ in kept]
        for i, (whole, exchanges, note) in enumerate(kept):
            other = mismatched(firsts, i) if self._data.rows == "labelled" else None
            document = self._fit(whole, exchanges, other, note, counts)
            if document is not None:
                counts.add_document(document)
                made.append(document)
        return made

    def _exchanges(self, wholes: Sequence[Whole], counts: Counts) -> list[Exchange]:
        """None of them where an answer is empty or both are one."""
        found = [as_exchange(whole.tokens, whole.targets) for whole in wholes]
        kept = [one for one in found if one is not None]
        if len(kept) < len(found):
            counts.of["untrained"] += 1
            return []
        if len(kept) == 2 and np.array_equal(wholes[0].tokens, wholes[1].tokens):
            counts.of["identical"] += 1
            return []
        return kept

    def _fit(
        self,
        whole: Whole,
        exchanges: list[Exchange],
        other: Exchange | None,
        note: float,
        counts: Counts,
    ) -> Document | None:
        limit = self._data.seq_len
        every = [*exchanges, other] if other is not None else exchanges
        size = sum(one.size for one in exchanges)
        if size > limit or max(one.size for one in exchanges) > self._each:
            counts.of["too_long"] += 1
            self._check(whole, size)
            if self._data.too_long == "drop":
                return None
        rest = (limit, self._each, self._bos)
        found = fitted(every, *rest) or fitted(exchanges, *rest)
        if found is None:
            counts.of["unfitting"] += 1
            answers = sum(len(one.answer) for one in exchanges)
            message = f"{whole.where}: answers of {answers:,} tokens do not fit seq_len = {limit:,}"
            counts.bad_rows.append(message)
            return None
        return side_by_side(found, whole, note)

    def _check(self, whole: Whole, size: int) -> None:
        if self._data.too_long == "fail":
            raise DataError(
                f"{whole.where}: has {size:,} tokens with all its answers, seq_len is "
                f'{self._data.seq_len:,}; raise seq_len or set too_long = "truncate" or "drop"'
            )
