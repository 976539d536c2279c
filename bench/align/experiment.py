"""What one learning task is: how it is prepared, learnt, measured and judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probe import Probe

from sterna.align.reward import Sample

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a figure of the last measurement on held-out prompts, or on its rise."""

    figure: str
    bound: float
    is_least: bool = True  # else the figure may be at most this
    is_rise: bool = False  # since the first measurement

    def is_met(self, first: float, last: float) -> bool:
        """Whether the last value is on the right side."""
        value = last - first if self.is_rise else last
        return value >= self.bound if self.is_least else value <= self.bound

    def __str__(self) -> str:
        what = f"rise of {self.figure}" if self.is_rise else self.figure
        return f"{what} {'>=' if self.is_least else '<='} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Experiment:
    """One task. `prepare(folder, seed)` makes what the recipe reads, once; its facts are kept."""

    name: str
    about: str
    steps: int
    variants: Sequence[str]  # of the algorithm; the first is the one that has to reach the targets
    prepare: Callable[[Path, int], Values]
    recipe: Callable[[Values, int, str], Values]  # (facts, seed, variant) -> sections of RlRecipe
    probe: Callable[[], Probe]
    targets: Sequence[Target]
    shown: Sequence[str]  # figures of the plot, those of the steps or of the measurements
    has_own_base: bool = True  # a preparation a seed; else one for all of them


def gap(samples: Sequence[Sample], wanted: Callable[[Sample], float]) -> float:
    """The mean of a figure over samples."""
    return sum(wanted(sample) for sample in samples) / max(len(samples), 1)
