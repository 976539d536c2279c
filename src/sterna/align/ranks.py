"""Ranks that torchrun started: completions, scores and gradients of a step shared between them.

Rank 0 runs the loop and asks all ranks, itself included, for their shares (workers.py); prompts,
rewards, hooks and checkpoints are its own. Every rank holds the whole policy, optimizer and critic.

    completions   by prompts; the same tokens for any number of ranks
    scores        by completions; the same bits
    gradients     by completions of a minibatch. Token weights are those of the whole minibatch, so
                  its gradient is the sum over the ranks (gloo or NCCL), equal to one rank's up to
                  the order of that sum

After each update the ranks compare checksums of their weights; ranks that drifted end the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from sterna.align.draw import make_draw, make_toolbox
from sterna.align.engines import EngineActor, EngineGroup
from sterna.align.experience import Experience, Models
from sterna.align.hybrid import HybridEngine
from sterna.align.learner import Learner, Trained
from sterna.align.ptx import Ptx
from sterna.align.reward import Sample
from sterna.align.rlresult import RlResult
from sterna.align.rltrainer import RlTrainer
from sterna.align.rollout import Rollout
from sterna.align.spawn import meet
from sterna.align.transport_checks import checksum
from sterna.align.workers import RemoteGroup, WorkerGroup, everyone
from sterna.core.errors import ConfigError, TransportError, WorkerError
from sterna.core.machine import num_usable_cpus
from sterna.parallel.collectives import broadcast_object
from sterna.parallel.mesh import Mesh
from sterna.train.signals import StopSignals

T = TypeVar("T")
# Figures that every rank has alike; others are sums over the completions, or extremes.
_ALIKE = ("grad_norm", "value_grad_norm", "explained_variance")


class RankActor(EngineActor):
    """What one rank does for the run."""

    def __init__(self, hybrid: HybridEngine, models: Models, learner: Learner) -> None:
        weights = dict(learner.policy.model.named_parameters())
        super().__init__(hybrid, weights)
        self._models = models
        self._learner = learner
        self.result: RlResult | None = None

    def shown(self, version: int) -> dict[str, int]:
        """`publish`, and the checksums of the weights."""
        self.publish(version)
        return {name: checksum(weight) for name, weight in self._weights.items()}

    def scores(self, which: str, rollouts: Sequence[Rollout]) -> Tensor:
        """Numbers of a model of `Models` for the completions' tokens."""
        found: Tensor = getattr(self._models, which)(rollouts)
        return found

    def learn(self, *args: Any) -> dict[str, float]:
        """This rank's part of Learner.learn."""
        return self._learner.learn(*args)

    def end(self, result: RlResult) -> None:
        """The run has ended well."""
        self.result = result


class Replicated:
    """Shows ranks a version they have trained themselves. TransportError where weights differ."""

    def __call__(self, group: WorkerGroup, version: int) -> None:
        """See Show."""
        sums = everyone(group, "shown", version)
        for rank, own in enumerate(sums):
            odd = [name for name, value in own.items() if value != sums[0][name]]
            if odd:
                raise TransportError(
                    f"rank {rank} holds another {odd[0]} than rank 0 after update {version} "
                    f"({len(odd)} of {len(own)} weights differ); the newest checkpoint is whole: "
                    "continue with --resume on like machines"
                )

    def close(self) -> None:
        """See Show."""


class SharedLearner:
    """A Learner whose steps all ranks make together; the models are rank 0's."""

    def __init__(self, group: WorkerGroup, own: Learner) -> None:
        self._group = group
        self._own = own

    @property
    def policy(self) -> Trained:
        """See Learner."""
        return self._own.policy

    @property
    def critic(self) -> Trained | None:
        """See Learner."""
        return self._own.critic

    @property
    def ptx(self) -> Ptx | None:
        """See Learner; rank 0's."""
        return self._own.ptx

    def learn(self, experience: Experience, *args: Any) -> dict[str, float]:
        """See Learner. WorkerError names a rank that died or hangs."""
        return merged(everyone(self._group, "learn", experience, *args))


def merged(logs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The figures of a step from those of its ranks."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for log in logs for name in log):
        values = [log[name] for log in logs if name in log]
        if name in _ALIKE:
            found[name] = values[0]
        elif name.endswith(("/max", "/min")):
            found[name] = max(values) if name.endswith("/max") else min(values)
        else:
            found[name] = sum(values)
    return found


def on_main(mesh: Mesh, act: Callable[[], T]) -> T:
    """What rank 0 gets from `act`, on every rank; its error likewise."""
    value, error = None, None
    if mesh.is_main:
        try:
            value = act()
        except Exception as raised:  # noqa: BLE001  raised below, on all ranks
            error = raised
    value, error = broadcast_object((value, error), mesh.data)
    if error is not None:
        raise error
    found: T = value
    return found


class NoReward:
    """In the place of the rewards on ranks that are not asked for any."""

    name = "none"

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """Not called."""
        raise WorkerError("rewards are rank 0's")


def threads_of_rank() -> int:
    """An even share of the CPUs for each process that torchrun started on this machine."""
    return max(1, num_usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def share(trainer: RlTrainer, mesh: Mesh) -> RankActor | None:
    """Spread a started trainer over the ranks: its parts ask all of them from now on.

    On rank 0 returns None; on the others what served it, when rank 0 has closed.
    """
    parts = trainer.parts
    if not isinstance(parts.hybrid, HybridEngine):
        raise ConfigError(
            f"rollout.workers is {parts.recipe.rollout.workers} under torchrun, whose ranks draw "
            "already; set it to 0",
            param="rollout.workers",
        )
    if parts.draw is not parts.ask:
        raise ConfigError(
            f"distill.lmbda is {parts.recipe.distill.lmbda} under torchrun, whose ranks draw all "
            "completions; set it to 1",
            param="distill.lmbda",
        )
    assert isinstance(parts.learner, Learner), "spread once"
    parts.learner.axis = mesh.data
    actor = RankActor(parts.hybrid, parts.models, parts.learner)
    send = partial(broadcast_object, axis=mesh.data)
    with nullcontext() if mesh.is_main else StopSignals():
        group = meet(mesh.rank, mesh.world, send, actor, parts.recipe.run.timeout_s)
    if group is None:
        return actor
    _spread(trainer, group, parts.hybrid, parts.learner)
    return None


def _spread(
    trainer: RlTrainer, group: RemoteGroup, own: HybridEngine, own_learner: Learner
) -> None:
    parts = trainer.parts
    engine = EngineGroup(group, Replicated(), own.is_exact, sleeps=True)
    engine.version = own.version
    parts.draw.close()
    ask = make_draw(parts.recipe, engine, parts.tokenizer, make_toolbox(parts.recipe))
    asked = {
        name: None if getattr(parts.models, name) is None else partial(_scored, group, name)
        for name in ("policy", "reference", "critic")
    }
    trainer.parts = replace(
        parts,
        hybrid=engine,
        draw=ask,
        ask=ask,
        models=Models(**asked),
        learner=SharedLearner(group, own_learner),
    )
    trainer.tell_end = partial(everyone, group, "end")


def result_of(actor: RankActor) -> RlResult:
    """What a rank other than 0 returns. WorkerError when rank 0 went without a word."""
    if actor.result is None:
        raise WorkerError("rank 0 ended the run before its last step; its own message says why")
    return actor.result


def _scored(group: WorkerGroup, which: str, rollouts: Sequence[Rollout]) -> Tensor:
    """Each rank scores a stretch of the rollouts."""
    cuts = [len(rollouts) * i // group.size for i in range(group.size + 1)]
    group.start("scores", [(which, rollouts[begin:end]) for begin, end in pairwise(cuts)])
    return torch.cat(group.finish())
