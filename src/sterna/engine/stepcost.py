"""What a step with N rows costs on this machine: for the decision how much to guess.

    seconds(N, K) = level * shape[N] * (base[N] + per_key[N] / N * K)

N rows, all of them output rows; K is the sum over the rows of the keys each of them reads. `base`
and `per_key` are interpolated between sizes timed at start (costfile.py). Real steps correct both
factors. `level`: how busy the machine is, all sizes alike; from steps without drafts only, or rows
that cost more than was measured would pass for a busy machine. `shape`: sizes that prove dearer or
cheaper than others. Decisions use ratios, in which `level` cancels; it makes estimates and real
durations comparable.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

# Weight of a step without drafts in both factors: what changes the level also moves the shape of
# the sizes in use, a machine twice as slow by 4%. And of one with drafts in the shape.
LEVEL_WEIGHT, SHAPE_WEIGHT = 0.2, 0.01
DRAFTED_WEIGHT = 0.05
# How far one step may move them (a process that was paused shows a step of minutes), and how far
# the shape may go.
CLIP: Final = 1.5
MAX_SHAPE: Final = 4.0
# So many steps are taken into account at once.
SHAPE_EVERY: Final = 8
# Steps of a size before its shape is taken for known.
KNOWN: Final = 64.0


@dataclass(frozen=True, slots=True)
class CostPoint:
    """Seconds of a step of `num_rows` rows, and what each key that its sequence holds adds."""

    num_rows: int
    seconds: float
    per_key: float = 0.0


# Before anything was measured (tests, tools): reading weights as long as computing 16 rows.
UNMEASURED = tuple(CostPoint(n, 1e-3 * (1 + n / 16)) for n in (1, 1024))


class StepCost:
    """The formula of the module's docstring. `note` is its only writer."""

    def __init__(self, points: Sequence[CostPoint] = UNMEASURED) -> None:
        self.points = tuple(points)
        self.level = 1.0
        self._sizes = [p.num_rows for p in points]
        self._base = _interpolate([(p.num_rows, p.seconds) for p in points])
        self._per_key = _interpolate([(p.num_rows, p.per_key) for p in points])
        self._learned = [1.0] * len(points)
        self._shape = [1.0] * len(points)  # `_learned`, so that no size costs less than a smaller
        self._seen = [0.0] * len(points)
        self._num_notes = 0
        self._lines: dict[int, tuple[float, float]] = {}  # by rows: `unlevelled` is linear in keys

    def seconds(self, num_rows: int, num_keys: int) -> float:
        """Of a step whose rows read `num_keys` keys in all."""
        return self.level * self.unlevelled(num_rows, num_keys)

    def unlevelled(self, num_rows: int, num_keys: int) -> float:
        """`seconds` at level 1."""
        line = self._lines.get(num_rows)
        if line is None:
            line = self._lines[num_rows] = self._line_of(max(num_rows, 1))
        return line[0] + line[1] * num_keys

    def note(
        self, num_rows: int, num_keys: int, seconds: float, *, has_drafts: bool = False
    ) -> None:
        """Take the duration of a real step of decodes and perhaps their drafts."""
        ratio = seconds / self.seconds(num_rows, num_keys)
        excess = min(max(ratio, 1 / CLIP), CLIP) - 1
        if not has_drafts:
            self.level *= 1 + LEVEL_WEIGHT * excess
        rate = DRAFTED_WEIGHT if has_drafts else SHAPE_WEIGHT
        i, j, share = self._place(max(num_rows, 1))
        for at, weight in ((i, 1 - share), (j, share)):
            learned = self._learned[at] * (1 + rate * weight * excess)
            self._learned[at] = min(max(learned, 1 / MAX_SHAPE), MAX_SHAPE)
            self._seen[at] += weight
        self._num_notes += 1
        if self._num_notes % SHAPE_EVERY == 0:
            self._shape_up()
            self._lines.clear()

    def departure(self) -> float:
        """How much dearer one size proved against another than was measured, at most; 1 = as
        measured, or too few steps to tell.
        """
        known = [x for x, n in zip(self._learned, self._seen, strict=True) if n >= KNOWN]
        return max(known) / min(known) if known else 1.0

    def line(self) -> str:
        """For the log."""
        return ", ".join(f"{p.num_rows}: {p.seconds * 1e3:.1f} ms" for p in self.points)

    def _line_of(self, num_rows: int) -> tuple[float, float]:
        """Seconds without keys, and a key's."""
        i, j, share = self._place(num_rows)
        shape = (1 - share) * self._shape[i] + share * self._shape[j]
        return shape * _at(self._base, num_rows), shape * _at(self._per_key, num_rows) / num_rows

    def _place(self, num_rows: int) -> tuple[int, int, float]:
        """The measured sizes around: numbers of both, and the share of the second."""
        j = bisect_left(self._sizes, num_rows)
        if j == 0 or j == len(self._sizes):
            j = min(j, len(self._sizes) - 1)
            return j, j, 0.0
        low, high = self._sizes[j - 1], self._sizes[j]
        return j - 1, j, (num_rows - low) / (high - low)

    def _shape_up(self) -> None:
        floor = 0.0
        for i, point in enumerate(self.points):
            floor = max(floor, self._learned[i] * point.seconds)
            self._shape[i] = floor / point.seconds


def _interpolate(pairs: Sequence[tuple[int, float]]) -> list[float]:
    """A table from 0 to the last size."""
    sizes = [size for size, _ in pairs]
    table = [pairs[0][1]] * (sizes[0] + 1)
    for (low, a), (high, b) in pairwise(pairs):
        table += [a + (b - a) * (n - low) / (high - low) for n in range(low + 1, high + 1)]
    return table


def _at(table: list[float], size: int) -> float:
    """Beyond the end in proportion: there arithmetic dominates."""
    return table[size] if size < len(table) else table[-1] * size / (len(table) - 1)
