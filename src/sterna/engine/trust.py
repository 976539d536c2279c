"""How far a drafter's own probabilities are to be believed: corrected by what was accepted.

Two corrections, both learned from verified drafts. By source: of the tokens announced with
probability p, which share was accepted (a table over p with a slow memory). By sequence: a shift of
the log odds, so that a request whose text surprises its drafter stops paying for drafts at once.
The shift fades while nothing is tried, so that a request gets another chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

NUM_BINS: Final = 20
# A bin starts as if it had seen so many tokens that came true as announced ...
PRIOR_WEIGHT: Final = 8.0
# ... and forgets old ones at this rate per token.
MEMORY: Final = 0.998
# How much one token moves a sequence's log odds, and the largest shift.
STEP, MAX_SHIFT, FADE = 0.3, 3.0, 0.99


class SourceTrust:
    """The table of one drafter."""

    def __init__(self) -> None:
        middles = [(i + 0.5) / NUM_BINS for i in range(NUM_BINS)]
        self._hits = [PRIOR_WEIGHT * p for p in middles]
        self._trials = [PRIOR_WEIGHT] * NUM_BINS
        self._against = [(1 - p) / p for p in middles]

    def against(self, prob: float) -> float:
        """The odds against a token announced with `prob`."""
        return self._against[_bin(prob)]

    def note(self, prob: float, is_hit: bool) -> None:
        """Take a verified token."""
        i = _bin(prob)
        self._hits[i] = self._hits[i] * MEMORY + is_hit
        self._trials[i] = self._trials[i] * MEMORY + 1
        share = (self._hits[i] + 0.25) / (self._trials[i] + 0.5)
        self._against[i] = (1 - share) / share


class Trust:
    """The corrections of one engine's drafters."""

    def __init__(self) -> None:
        self._sources: dict[str, SourceTrust] = {}
        self._shifts: dict[object, float] = {}

    def reach(
        self, key: object, source: str, probs: Sequence[float], least: float = 0.0
    ) -> list[float]:
        """P(token i and all before it are accepted), for each i as long as it is `least`.

        `key` names the sequence.
        """
        against, shift = self._table(source).against, self._shifts.get(key, 0.0)
        against_seq = math.exp(-shift)
        reached, found = 1.0, []
        for prob in probs:
            reached /= 1 + against(prob) * against_seq
            if reached < least:
                break
            found.append(reached)
        return found

    def note(self, key: object, source: str, probs: Sequence[float], hits: Sequence[bool]) -> None:
        """Take what became of the first len(hits) tokens of a draft."""
        table, shift = self._table(source), self._shifts.get(key, 0.0)
        for prob, is_hit in zip(probs, hits, strict=False):
            believed = 1 / (1 + table.against(prob) * math.exp(-shift))
            shift += STEP * (is_hit - believed)
            table.note(prob, is_hit)
        self._shifts[key] = min(max(shift, -MAX_SHIFT), MAX_SHIFT)

    def fade(self, key: object) -> None:
        """A step went by without a try."""
        if key in self._shifts:
            self._shifts[key] *= FADE

    def forget(self, key: object) -> None:
        """The sequence has ended."""
        self._shifts.pop(key, None)

    def _table(self, source: str) -> SourceTrust:
        found = self._sources.get(source)
        if found is None:
            found = self._sources[source] = SourceTrust()
        return found


def _bin(prob: float) -> int:
    return int(prob * NUM_BINS) if 0 <= prob < 1 else (NUM_BINS - 1 if prob >= 1 else 0)
