"""What a rank does in the tests of several ranks: a run, or the refusal it meets."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sterna.core.errors import SternaError
from sterna.train.loop import train


def run_poisoned(folder, sections, bad_rank):
    """Train with weights that one rank alone has spoilt."""
    from sterna.train.hooks import Hook

    class Poison(Hook):
        def before_step(self, trainer, rows):
            if trainer.mesh.rank == bad_rank:
                trainer.parts.model.norm.weight.data[0] = float("nan")

    return run(folder, sections, hooks=[Poison()])


def run(folder, sections, resume=False, stop_after=None, hooks=()):
    """Train on this rank; (outcome, steps, loss, eval loss) or the error's message."""
    spec = importlib.util.spec_from_file_location("train_tiny", Path(__file__).with_name("tiny.py"))
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    hooks = [*hooks, *([] if stop_after is None else [_stopper(stop_after)])]
    try:
        result = train(tiny.recipe(Path(folder), **sections), resume=resume, hooks=hooks)
    except SternaError as error:
        return type(error).__name__, error.message
    return result.outcome, result.steps, result.loss, result.eval_loss


def _stopper(step):
    from sterna.train.hooks import Hook

    class Stop(Hook):
        def after_step(self, trainer, stats):
            if stats.step == step:
                trainer.stop("interrupted")

    return Stop()
