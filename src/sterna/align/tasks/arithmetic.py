"""Sums and differences of numbers below 100, exact match: `23+58=` -> `81`.

For small models with a character tokenizer. With `ones_first` an answer is written from its ones
on, terms have equal width and the larger one comes first, `05+09=` -> `41`, `58-23=` -> `53`: each
character then follows from two digits and a carry, and a small model learns to add instead of
learning sums by heart (arXiv 2307.03381, section 4). A sign would have to be known before the ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from sterna.align.reward import Sample
from sterna.align.tasks.base import Part, PromptRow
from sterna.data.order import mix, uniform

_HELD_OUT = 0.1


class Arithmetic:
    """Problems by number; a tenth of all pairs, in either order, is never trained."""

    name = "arithmetic"

    def __init__(self, most: int = 99, ones_first: int = 0) -> None:
        self._most = most
        self._ones_first = bool(ones_first)
        self._width = len(str(most)) if ones_first else 0

    def prompt(self, index: int, seed: int, part: Part) -> PromptRow:
        """See Task."""
        text, answer = self.problem(index, seed, part)
        return PromptRow(text, {"answer": answer})

    def problem(self, index: int, seed: int, part: Part) -> tuple[str, str]:
        """(question, answer)."""
        attempt = 0
        while True:
            a = mix(seed, index, attempt, 1) % (self._most + 1)
            b = mix(seed, index, attempt, 2) % (self._most + 1)
            is_sum = mix(seed, index, attempt, 3) % 2
            held_out = uniform(min(a, b), max(a, b), is_sum, 7) < _HELD_OUT
            if held_out == (part == "eval"):
                return self._written(a, b, "+" if is_sum else "-")
            attempt += 1

    def _written(self, a: int, b: int, sign: str) -> tuple[str, str]:
        if not self._ones_first:
            return f"{a}{sign}{b}=", str(a + b if sign == "+" else a - b)
        if sign == "-":
            a, b = max(a, b), min(a, b)
        question = f"{a:0{self._width}}{sign}{b:0{self._width}}="
        return question, str(a + b if sign == "+" else a - b)[::-1]

    def reward(self, samples: Sequence[Sample]) -> list[float]:
        """1 for the exact answer that ended by itself."""
        return [
            float(not s.rollout.is_truncated and s.completion.strip() == s.row["answer"])
            for s in samples
        ]

    def gold(self, samples: Sequence[Sample]) -> list[float] | None:
        """The reward says it all."""
        return None
