"""`align_rl(recipe)`: learning from rewards, to be read as a table of contents.

    from sterna.align.config import RlRecipe
    from sterna.align.rl import align_rl

    result = align_rl(RlRecipe(prompts={"task": "length"}, run={"steps": 30}))
    print(result.reward, result.model)

What the lines of `_run` do is in rltrainer.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from sterna.align.build import build
from sterna.align.config import RlRecipe
from sterna.align.reward import Reward
from sterna.align.rlhooks import RlHook
from sterna.align.rlresult import RlResult
from sterna.align.rltrainer import RlTrainer
from sterna.train.signals import StopSignals


def align_rl(
    recipe: RlRecipe,
    *,
    resume: bool = False,
    rewards: Sequence[Reward] = (),
    hooks: Sequence[RlHook] = (),
) -> RlResult:
    """Run a recipe to its end and return what came of it.

    `resume` continues from the newest complete checkpoint of `run.output`, bit by bit on a CPU.
    `rewards` take the place of the recipe's, each with weight 1. SIGINT and SIGTERM end the run
    after the current step with a checkpoint; the result says so.

    Raises ConfigError, DataError, ModelError, RewardError, NonFiniteError (the weights before the
    bad update are kept) or CheckpointError (the last good checkpoint is intact).
    """
    return _run(build(recipe, resume, rewards, hooks))


def _run(trainer: RlTrainer) -> RlResult:
    with trainer, StopSignals() as signals:
        trainer.start()
        while trainer.has_steps():
            prompts = trainer.next_prompts()
            rollouts = trainer.generate(prompts)
            rewards = trainer.reward(prompts, rollouts)
            experience = trainer.make_experience(prompts, rollouts, rewards)
            trainer.learn(experience)
            trainer.after_step(experience)
            trainer.heed(signals)
        return trainer.finish()
