"""`train(recipe)`: the training loop, to be read as a table of contents.

    from sterna.train.config import Recipe
    from sterna.train.loop import train

    result = train(Recipe(data={"sources": [{"path": "chats.jsonl"}]}, run={"steps": 200}))
    print(result.loss, result.model)

What the lines of `_run` do is in trainer.py.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

from sterna.train.autoplan import more_frugal
from sterna.train.build import build
from sterna.train.config import Recipe
from sterna.train.hooks import Hook
from sterna.train.report import Generate
from sterna.train.result import TrainResult
from sterna.train.signals import StopSignals
from sterna.train.task import Task
from sterna.train.trainer import Trainer


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
    memory goes on from its last checkpoint with more frugal settings; on several ranks it raises
    TrainError naming them.
    """
    while True:
        trainer = build(recipe, resume, hooks, task, generate)
        try:
            return _run(trainer)
        except (MemoryError, RuntimeError) as error:
            frugal = more_frugal(trainer.parts, error)
            if frugal is None:
                raise
        del trainer
        gc.collect()  # it is part of a cycle; the next one needs its memory
        recipe, resume = frugal, True


def _run(trainer: Trainer) -> TrainResult:
    with trainer, StopSignals() as signals:
        trainer.start()
        for rows in trainer.steps():
            loss = trainer.compute_gradients(rows)
            trainer.check_finite(loss, rows)
            trainer.update_weights(loss)
            trainer.after_step(loss)
            trainer.heed(signals)
        return trainer.finish()
