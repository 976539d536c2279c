"""What features hang on: a hook is called around each step, eval and save of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sterna.data.pack import PackedRow

if TYPE_CHECKING:
    from sterna.train.trainer import Trainer


@dataclass(frozen=True, slots=True)
class StepStats:
    """What is known after a step; `step` counts finished steps, so the first is 1."""

    step: int
    loss: float
    grad_norm: float  # before clipping
    lr: float
    num_tokens: int
    num_targets: int
    seconds: float
    data_seconds: float  # of them, waiting for rows
    model_flops: float  # causal, no recompute
    figures: dict[str, float] = field(default_factory=dict)  # what the kind of training adds


@dataclass(frozen=True, slots=True)
class EvalStats:
    """The result of one eval."""

    step: int
    loss: float
    num_targets: int
    seconds: float
    is_best: bool
    figures: dict[str, float] = field(default_factory=dict)


class Hook:
    """Does nothing; override what is needed. Hooks are called in order, on every rank."""

    def on_start(self, trainer: Trainer) -> None:
        """Once, after a checkpoint was resumed and before the first step."""

    def before_step(self, trainer: Trainer, rows: Sequence[PackedRow]) -> None:
        """Before the forward of a step."""

    def after_step(self, trainer: Trainer, stats: StepStats) -> None:
        """After the weights were updated; call `trainer.stop(reason)` to end the run."""

    def on_eval(self, trainer: Trainer, stats: EvalStats) -> None:
        """After an eval."""

    def on_save(self, trainer: Trainer, folder: Path) -> None:
        """A checkpoint is complete on disk."""

    def on_end(self, trainer: Trainer) -> None:
        """Once, after the final model was written; not called after an error."""

    def report(self, trainer: Trainer) -> str:
        """HTML to be added to the report; empty = nothing. The main rank only."""
        return ""

    def close(self) -> None:
        """Once, however the run ended."""
