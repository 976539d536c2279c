"""What `train` returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Outcome = Literal["done", "data ended", "stopped early", "interrupted", "terminated"]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended. `loss` is that of the last step, `eval_loss` the last eval's."""

    outcome: Outcome
    steps: int
    loss: float | None
    eval_loss: float | None
    output: Path
    model: Path  # Hugging Face folder of the final weights
    checkpoint: Path | None  # newest one
