"""`train(recipe)`: the training loop, to be read as a table of contents.

from sterna.train.config import Recipe
from sterna.train.loop import train

result = train(Recipe(data={"sources": [{"path": "chats.jsonl"}]}, run={"steps": 200}))
print(result.loss, result.model)
"""

from __future__ import annotations

from collections.abc import Sequence

from sterna.train.autoplan import more_frugal
from sterna.train.build import build
from sterna.train.config import Recipe
from sterna.train.hooks import Hook
from sterna.train.report import Generate
from sterna.train.result import TrainResult
from sterna.train.signals import StopSignals
from sterna.train.task import Task


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    hooks: Sequence[Hook] = (),
    task: Task | None = None,
    generate: Generate | None = None,
) -> TrainResult:
    """Run a recipe to its end and return what came of it.

    `resume` continues from the newest complete checkpoint of `run.output`, bit by bit on a CPU.
    `hooks` run after the built-in ones; `task` replaces the model, loss and saving of `kind`;
    `generate` answers the report's sample prompts. SIGINT and SIGTERM end the run after the
    current step with a checkpoint; the result says so.

    Raises ConfigError, DataError, ModelError, NonFiniteError (the state before the bad step is
    kept) or CheckpointError (the last good checkpoint is intact). With `longseq.auto` a run out of
    memory goes on from its last checkpoint with more frugal settings.
    """
    while True:
        try:
            return _train(recipe, resume, hooks, task, generate)
        except (MemoryError, RuntimeError) as error:
            frugal = more_frugal(recipe, error, recipe.parallel.sp)
            if frugal is None:
                raise
            recipe, resume = frugal, True


def _train(
    recipe: Recipe,
    resume: bool,
    hooks: Sequence[Hook],
    task: Task | None,
    generate: Generate | None,
) -> TrainResult:
    with build(recipe, resume, hooks, task, generate) as trainer, StopSignals() as signals:
        trainer.start()
        for rows in trainer.steps():
            loss = trainer.compute_gradients(rows)
            trainer.check_finite(loss, rows)
            trainer.update_weights(loss)
            trainer.after_step(loss)
            trainer.heed(signals)
        return trainer.finish()
