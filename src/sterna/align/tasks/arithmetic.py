"""Sums and differences of numbers below 100, exact match: `23+58=` -> `81`.

For small models with a character tokenizer; `text` gives the lines that teach them the form.
"""

from __future__ import annotations

from collections.abc import Sequence

from sterna.align.reward import Sample
from sterna.align.tasks.base import Part, PromptRow
from sterna.data.order import mix, uniform

_HELD_OUT = 0.1


class Arithmetic:
    """Problems by number; a tenth of all pairs is never trained."""

    name = "arithmetic"

    def __init__(self, most: int = 99) -> None:
        self._most = most

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
            if (uniform(a, b, is_sum, 7) < _HELD_OUT) == (part == "eval"):
                return (f"{a}+{b}=", str(a + b)) if is_sum else (f"{a}-{b}=", str(a - b))
            attempt += 1

    def reward(self, samples: Sequence[Sample]) -> list[float]:
        """1 for the exact answer that ended by itself."""
        return [
            float(not s.rollout.is_truncated and s.completion.strip() == s.row["answer"])
            for s in samples
        ]

    def gold(self, samples: Sequence[Sample]) -> list[float] | None:
        """The reward says it all."""
        return None
