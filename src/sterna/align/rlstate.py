"""A run's state as tensors and JSON, and back: with it a run goes on bit by bit on a CPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sterna.align.adapted import policy_files
from sterna.train import checkpoint
from sterna.train.checkpoint import Snapshot
from sterna.train.parts import trained
from sterna.version import __version__

if TYPE_CHECKING:
    from sterna.align.rltrainer import RlTrainer


@dataclass(slots=True)
class RlCounters:
    """Counts since the first step."""

    step: int = 0
    num_completions: int = 0
    num_tokens: int = 0  # of prompts and completions
    seconds: float = 0.0


def snapshot(trainer: RlTrainer) -> Snapshot:
    """A copy of everything that later steps do not touch.

    No copy where the run waits for the write (`checkpoint.is_async` = false).
    """
    parts, learner = trainer.parts, trainer.parts.learner
    ahead = trainer.ahead.state()
    model = learner.policy.model
    weights = policy_files(parts.recipe, model)
    is_copy = parts.recipe.checkpoint.is_async
    tensors = {name: tensor.to("cpu", copy=is_copy) for name, tensor in weights.tensors}
    own = _tensors(trainer).items()
    state = {key: value.detach().to("cpu", copy=is_copy) for key, value in own}
    meta = {
        "sterna": __version__,
        "counters": asdict(trainer.counters),
        "prompts": {
            "position": parts.prompts.position,
            "too_long": parts.prompts.num_too_long,
            "bad": parts.prompts.num_bad,
        },
        "ahead": ahead,
        "kl_coef": parts.kl.coef,
        "ptx": learner.ptx.state_dict() if learner.ptx else None,
        "policy_version": parts.hybrid.version,
        "updates": [
            learner.policy.num_updates,
            learner.critic.num_updates if learner.critic else 0,
        ],
        "recipe": parts.recipe.model_dump(mode="json"),
    }
    return Snapshot(
        trainer.counters.step,
        tensors,
        weights.config,
        {**parts.files, **weights.files},
        state,
        meta,
    )


def restore(folder: Path, trainer: RlTrainer) -> None:
    """Take over a checkpoint's state; the policy's weights were read when it was built."""
    parts, learner = trainer.parts, trainer.parts.learner
    meta: dict[str, Any] = checkpoint.read_meta(folder)
    for name, value in meta["counters"].items():
        setattr(trainer.counters, name, value)
    ahead = meta.get("ahead")
    if ahead is not None:
        parts.prompts.position = ahead["position"]
        prompts = parts.prompts.take(parts.recipe.rollout.prompts_per_step)
        trainer.ahead.restore(ahead, prompts)
    parts.prompts.position = meta["prompts"]["position"]
    parts.prompts.num_too_long = meta["prompts"]["too_long"]
    parts.prompts.num_bad = meta["prompts"]["bad"]
    parts.kl.coef = meta["kl_coef"]
    if learner.ptx is not None:
        learner.ptx.load_state_dict(meta["ptx"])
    parts.hybrid.version = meta["policy_version"]
    learner.policy.num_updates = meta["updates"][0]
    if learner.critic is not None:
        learner.critic.num_updates = meta["updates"][1]
    state = _tensors(trainer)
    checkpoint.load_state(folder, state)
    torch.set_rng_state(state["rng/cpu"])


def _tensors(trainer: RlTrainer) -> dict[str, Tensor]:
    """Optimizer states, critic and EMA by key, themselves and not copies."""
    learner = trainer.parts.learner
    found = _of_optimizer("optim", learner.policy.optimizer.state_dict())
    if learner.critic is not None:
        found |= _of_optimizer("critic_optim", learner.critic.optimizer.state_dict())
        found |= {f"critic/{name}": p.detach() for name, p in trained(learner.critic.model)}
    if trainer.parts.ema is not None:
        found |= {f"ema/{name}": value for name, value in trainer.parts.ema.averages.items()}
    found["rng/cpu"] = torch.get_rng_state()
    return {key: tensor for key, tensor in found.items() if tensor.numel()}


def _of_optimizer(prefix: str, states: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{prefix}/{name}/{key}": tensor
        for name, each in states.items()
        for key, tensor in each.items()
    }
