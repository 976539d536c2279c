"""What a run has done so far: the numbers that a checkpoint carries besides tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Counters:
    """Counts since the first step; `Trainer` alone changes them."""

    step: int = 0  # finished optimizer steps
    num_tokens: int = 0
    num_targets: int = 0
    num_rows: int = 0  # of all ranks
    seconds: float = 0.0  # in steps
    best_loss: float | None = None  # of the evals
    best_step: int | None = None
    evals_since_best: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def load(self, values: dict[str, Any]) -> None:
        """Take over the values of `as_dict`."""
        for name, value in values.items():
            setattr(self, name, value)
