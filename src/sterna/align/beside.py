"""What a run leaves beside its model: the averaged policy, and the critic.

RUN/model/    the policy's last weights
RUN/ema/      their average, with optim.ema_decay; DeepSpeed-Chat found that it often reads better
RUN/critic/   PPO's value function, a folder like a reward model's
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sterna.align.adapted import policy_files, shares_base
from sterna.core.rundir import write_atomic
from sterna.model.value import ValueModel, value_hf_config, value_tensors
from sterna.train.checkpoint import publish
from sterna.train.task import Weights

if TYPE_CHECKING:
    from sterna.align.rltrainer import RlParts


def publish_beside(parts: RlParts, latest: Path) -> None:
    """Write the folders that the recipe has; `latest`: the checkpoint with the tokenizer's files.

    A critic that shares the policy's base has no folder. OSError for a full disk, with what was
    there before left as it was.
    """
    recipe, learner = parts.recipe, parts.learner
    output = recipe.run.output
    if parts.ema is not None:
        with parts.ema.in_place():
            weights = policy_files(recipe, learner.policy.model)
            if weights.config:
                publish(latest, output / "ema", weights, parts.files)
            for name, content in weights.files.items():  # an adapter's
                write_atomic(output / "ema" / name, content)
    critic = learner.critic.model if learner.critic is not None else None
    if isinstance(critic, ValueModel) and not shares_base(recipe):
        weights = Weights(value_tensors(critic), value_hf_config(critic), {})
        publish(latest, output / "critic", weights, parts.files)
