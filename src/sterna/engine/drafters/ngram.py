"""Prompt lookup: what followed the last time the sequence's final n tokens occurred in it.

The drafter of vLLM's "ngram" and llama.cpp's lookup. The longest n-gram with an earlier occurrence
wins, the latest occurrence of it is copied. It needs no extension, and the suffix tree is
measured against it.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from sterna.engine.drafters.base import Draft
from sterna.engine.sequence import Sequence


@dataclass(slots=True)
class Text:
    """A sequence's tokens, and where each n-gram that something followed ended last."""

    tokens: list[int] = field(default_factory=list)
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_seen: int = 0  # of the output

    def append(self, tokens: Seq[int], min_n: int, max_n: int) -> None:
        """Take new tokens; an n-gram counts from when its next token is known."""
        text, ends = self.tokens, self.ends
        for token in tokens:
            size = len(text)
            for n in range(min_n, min(max_n, size) + 1):
                ends[tuple(text[size - n :])] = size
            text.append(token)


class NgramDrafter:
    """Looks up n-grams of `max_n` down to `min_n` tokens.

    A match of n tokens is believed to go on with probability n / (n + 1) a token; the speculator
    corrects that by what is accepted.
    """

    name = "ngram"

    def __init__(self, min_n: int = 2, max_n: int = 4) -> None:
        if not 1 <= min_n <= max_n:
            raise ValueError(f"n-grams of {min_n} to {max_n}; min_n is 1 to max_n")
        self._min_n = min_n
        self._max_n = max_n
        self._texts: dict[Sequence, Text] = {}

    def propose(self, seqs: Seq[Sequence], limits: Seq[int]) -> list[Draft | None]:
        """See Drafter."""
        return [self._propose(seq, limit) for seq, limit in zip(seqs, limits, strict=True)]

    def finish(self, seq: Sequence) -> None:
        """See Drafter."""
        self._texts.pop(seq, None)

    def _propose(self, seq: Sequence, limit: int) -> Draft | None:
        if limit <= 0:
            return None
        text = self._texts.get(seq)
        if text is None:
            text = self._texts[seq] = Text()
            text.append(seq.state.prompt.tolist(), self._min_n, self._max_n)
        text.append(seq.output[text.num_seen :], self._min_n, self._max_n)
        text.num_seen = len(seq.output)
        size = len(text.tokens)
        for n in range(min(self._max_n, size), self._min_n - 1, -1):
            end = text.ends.get(tuple(text.tokens[size - n :]))
            if end is not None:
                found = text.tokens[end : end + limit]
                return Draft(found, [n / (n + 1)] * len(found), self.name)
        return None
