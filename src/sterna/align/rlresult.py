"""What a run of reinforcement learning ends with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

RlOutcome = Literal["done", "interrupted", "terminated"]


@dataclass(frozen=True, slots=True)
class RlResult:
    """Where the run stands."""

    outcome: RlOutcome
    steps: int
    reward: float | None  # mean of the last step
    eval_reward: float | None  # of the last eval
    output: Path
    model: Path
    checkpoint: Path | None
