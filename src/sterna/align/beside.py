"""What a run leaves beside its model: the averaged policy, and the critic.

RUN/model/    the policy's last weights
RUN/ema/      their average, with optim.ema_decay; DeepSpeed-Chat found that it often reads better
RUN/critic/   PPO's value function, a folder like a reward model's

Of an adapted policy, and a critic on its base, these are PEFT's files, with the score beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sterna.align.adapted import policy_files, value_files
from sterna.model.value import ValueModel
from sterna.train.checkpoint import publish

if TYPE_CHECKING:
    from sterna.align.rltrainer import RlParts


def publish_beside(parts: RlParts, latest: Path) -> None:
    """Write the folders that the recipe has; `latest`: the checkpoint with the tokenizer's files.

    OSError for a full disk, with what was there before left as it was.
    """
    recipe, learner = parts.recipe, parts.learner
    output = recipe.run.output
    if parts.ema is not None:
        with parts.ema.in_place():
            weights = policy_files(recipe, learner.policy.model)
            publish(latest, output / "ema", weights, parts.files)
    critic = learner.critic.model if learner.critic is not None else None
    if isinstance(critic, ValueModel):
        weights = value_files(critic, recipe.model.path)
        publish(latest, output / "critic", weights, parts.files)
