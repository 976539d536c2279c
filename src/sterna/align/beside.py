"""What a run leaves beside its model: the averaged policy, and the critic.

RUN/model/    the policy's last weights
RUN/ema/      their average, with optim.ema_decay; DeepSpeed-Chat found that it often reads better
RUN/critic/   PPO's value function, a folder like a reward model's
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sterna.model.value import ValueModel, value_hf_config, value_tensors
from sterna.train.checkpoint import publish
from sterna.train.sft import Sft
from sterna.train.task import Weights

if TYPE_CHECKING:
    from sterna.align.rltrainer import RlParts


def publish_beside(parts: RlParts, latest: Path) -> None:
    """Write the folders that the recipe has; `latest`: the checkpoint with the tokenizer's files.

    OSError for a full disk, with what was there before left as it was.
    """
    output, learner = parts.recipe.run.output, parts.learner
    if parts.ema is not None:
        with parts.ema.in_place():
            publish(latest, output / "ema", Sft().weights(learner.policy.model), parts.files)
    critic = learner.critic.model if learner.critic is not None else None
    if isinstance(critic, ValueModel):
        weights = Weights(value_tensors(critic), value_hf_config(critic), {})
        publish(latest, output / "critic", weights, parts.files)
