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
from sterna.align.ranks import result_of, share
from sterna.align.reward import Reward
from sterna.align.rlhooks import RlHook
from sterna.align.rlresult import RlResult
from sterna.align.rltrainer import RlTrainer
from sterna.parallel.config import ParallelConfig
from sterna.parallel.mesh import Mesh, open_mesh
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
    after the current step with a checkpoint; the result says so. Under torchrun every rank calls
    this with the same recipe and gets the same result (ranks.py).

    Raises ConfigError, DataError, ModelError, RewardError, NonFiniteError (the weights before the
    bad update are kept), WorkerError (a process died or hangs) or CheckpointError (the last good
    checkpoint is intact).
    """
    mesh = open_mesh(
        ParallelConfig.model_validate({"timeout_s": recipe.run.timeout_s}), recipe.model.device
    )
    return _run(build(recipe, resume, rewards, hooks, mesh=mesh), mesh)


def _run(trainer: RlTrainer, mesh: Mesh) -> RlResult:
    with trainer, StopSignals() as signals:
        trainer.start()
        if mesh.world > 1 and (actor := share(trainer, mesh)) is not None:
            return result_of(actor)
        while trainer.has_steps():
            prompts = trainer.next_prompts()
            rollouts = trainer.generate(prompts)
            rewards = trainer.reward(prompts, rollouts)
            experience = trainer.make_experience(prompts, rollouts, rewards)
            trainer.learn(experience)
            trainer.after_step(experience)
            trainer.heed(signals)
        return trainer.finish()
