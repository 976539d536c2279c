"""The hooks that make a run take care of itself: evals, early stop, checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sterna.core.log import get_logger
from sterna.train.config import CheckpointSection, EvalSection
from sterna.train.hooks import EvalStats, Hook, StepStats

if TYPE_CHECKING:
    from sterna.train.trainer import Trainer

_log = get_logger(__name__)


class Evaluation(Hook):
    """Evaluates before the first step, every `every` steps and at the end; stops without gain."""

    def __init__(self, settings: EvalSection) -> None:
        self._settings = settings

    def on_start(self, trainer: Trainer) -> None:
        """The loss before training: what everything is compared with."""
        if trainer.counters.step == 0 and self._settings.every:
            trainer.evaluate()

    def after_step(self, trainer: Trainer, stats: StepStats) -> None:
        """Evaluate when it is time."""
        every, last = self._settings.every, trainer.recipe.run.steps
        if (every and stats.step % every == 0) or stats.step == last:
            trainer.evaluate()

    def on_eval(self, trainer: Trainer, stats: EvalStats) -> None:
        """Stop after `patience` evals without a better loss."""
        waited, patience = trainer.counters.evals_since_best, self._settings.patience
        if patience and waited >= patience:
            _log.info(
                "step %d: no lower eval loss than %.4f in %d evals; stopping",
                stats.step, trainer.counters.best_loss, waited,
            )  # fmt: skip
            trainer.stop("stopped early")


class Checkpoints(Hook):
    """Saves every `every` steps and, with `keep_best`, after an eval that was the best so far."""

    def __init__(self, settings: CheckpointSection) -> None:
        self._settings = settings

    def after_step(self, trainer: Trainer, stats: StepStats) -> None:
        """Save when it is time. Comes after `Evaluation`, so it knows of this step's eval."""
        every = self._settings.every
        is_best = self._settings.keep_best and trainer.counters.best_step == stats.step
        if (every and stats.step % every == 0) or is_best:
            trainer.save()
