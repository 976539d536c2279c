"""Losses that read packed rows as they are: pairs of answers, labels, whatever a document notes.

A plain `Loss` sees a flat batch and targets, and is counted in trained tokens. A RowLoss makes its
own batches, counts in its own unit (pairs, say) and says more of a step than its loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sterna.data.pack import PackedRow
from sterna.parallel.mesh import Mesh


class RowLoss(ABC):
    """One kind of loss on documents. `names` are those of its figures."""

    names: tuple[str, ...] = ()

    @abstractmethod
    def count(self, row: PackedRow) -> int:
        """What a row counts in the mean over a step."""

    def prepare(self, model: Any, rows: Sequence[PackedRow], mesh: Mesh) -> None:
        """Learn what is of a whole step or eval, before any of its micro-batches; collective."""
        return

    @abstractmethod
    def __call__(self, model: Any, rows: Sequence[PackedRow]) -> tuple[Tensor, Tensor]:
        """(sum of the losses, with a graph also where nothing counts; [F, 2] float64: sum and
        number of each figure) of a micro-batch."""

    def figures(self, means: Mapping[str, float]) -> dict[str, float]:
        """What is logged, from the means over the step's ranks and micro-batches."""
        return dict(means)
