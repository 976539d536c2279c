"""What features hang on around each step of reinforcement learning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sterna.align.experience import Experience
    from sterna.align.rltrainer import RlTrainer


class RlHook:
    """Does nothing; override what is needed. Hooks are called in order."""

    def on_start(self, trainer: RlTrainer) -> None:
        """Once, after a checkpoint was resumed and before the first step."""

    def after_step(
        self, trainer: RlTrainer, step: int, figures: Mapping[str, float], experience: Experience
    ) -> None:
        """After the weights were updated; `step` counts finished steps."""

    def on_eval(self, trainer: RlTrainer, step: int, figures: Mapping[str, float]) -> None:
        """After an eval."""

    def on_save(self, trainer: RlTrainer, folder: Path) -> None:
        """A checkpoint is complete on disk."""

    def on_end(self, trainer: RlTrainer) -> None:
        """Once, after the final model was written; not called after an error."""

    def close(self) -> None:
        """Once, however the run ended."""
