"""From an experience to new weights: epochs over minibatches, each one optimizer step.

Token weights are computed over a whole minibatch and every micro-batch adds its part, so the
gradient does not depend on `micro_tokens`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sterna.align.config import AlgorithmSection
from sterna.align.experience import Experience, kl_place
from sterna.align.flat import Layout, layout_of, token_weights
from sterna.align.kl import kl_estimate
from sterna.align.loss import (
    PolicyLossSettings,
    explained_variance,
    policy_loss,
    rollout_correction,
    value_loss,
)
from sterna.align.ptx import Ptx
from sterna.align.rollout import Rollout
from sterna.align.score import added_tokens, completion_logprobs, scored_batch
from sterna.core.errors import NonFiniteError
from sterna.data.order import Permutation, mix
from sterna.kernels.scores import Distribution
from sterna.model.batch import Batch
from sterna.parallel.mesh import Axis
from sterna.train.gradients import Gradients
from sterna.train.optim import AdamW
from sterna.train.step import TrainModel

# Of a policy's step, summed over its completions: 0 on a rank without any.
_SUMS = (
    "loss",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "ratio/mean",
    "approx_kl",
)


class ValueFunction(Protocol):
    """What a critic is: a value for every token of a batch."""

    def values(self, batch: Batch) -> Tensor:
        """float32 [T], with a graph."""
        ...


@dataclass(slots=True)
class Trained:
    """A model, its optimizer and the gradients of its step."""

    model: Any
    optimizer: AdamW
    gradients: Gradients
    grad_clip: float
    num_updates: int = 0

    def update(self, lr: float, what: str, ranks: int = 1) -> float:
        """One optimizer step; returns the gradient's norm before clipping.

        `ranks`: the gradients are means over so many ranks, of what is to be their sum.

        NonFiniteError, with the weights as they were, when it is NaN or infinite.
        """
        norm = math.sqrt(float(self.gradients.square_sum())) * ranks
        if not math.isfinite(norm):
            self.gradients.clear()
            raise NonFiniteError(
                f"the gradient norm of the {what} is {norm}; its weights are unchanged. Lower the "
                "learning rate or look at the step's rewards"
            )
        scale = self.grad_clip / norm if self.grad_clip and norm > self.grad_clip else 1.0
        self.optimizer.step(self.gradients, self.num_updates, lr, scale * ranks)
        self.num_updates += 1
        return norm


class Learns(Protocol):
    """What the loop asks of a learner: of one process or of all ranks."""

    @property
    def policy(self) -> Trained:
        """The trained model."""
        ...

    @property
    def critic(self) -> Trained | None:
        """PPO's value function."""
        ...

    @property
    def ptx(self) -> Ptx | None:
        """Text mixed into the updates."""
        ...

    def learn(
        self,
        experience: Experience,
        step: int,
        kl_coef: float,
        lr: float,
        critic_lr: float,
        max_tokens: int,
        trains_policy: bool = True,
    ) -> dict[str, float]:
        """See Learner."""
        ...


def values_of(critic: ValueFunction, rollouts: Sequence[Rollout], device: torch.device) -> Tensor:
    """[N]: what the critic expected before each completion token."""
    scored = scored_batch(critic, rollouts, device)
    return critic.values(scored.batch).index_select(0, scored.rows)


class Learner:
    """Trains a policy, and a critic where there is one."""

    def __init__(
        self,
        policy: Trained,
        critic: Trained | None,
        settings: AlgorithmSection,
        distribution: Distribution,
        correction: str,
        seed: int,
        device: torch.device,
        ptx: Ptx | None = None,
    ) -> None:
        self.policy = policy
        self.critic = critic
        self.axis = Axis("data")  # ranks that share each minibatch; see ranks.py
        self.ptx = ptx
        self._settings = settings
        self._distribution = distribution
        self._correction: Any = correction
        self._seed = seed
        self._device = device
        self._loss = PolicyLossSettings(
            settings.loss, settings.ratio, settings.eps_low, settings.eps_high, settings.dual_clip
        )

    def learn(
        self,
        experience: Experience,
        step: int,
        kl_coef: float,
        lr: float,
        critic_lr: float,
        max_tokens: int,
        trains_policy: bool = True,
    ) -> dict[str, float]:
        """All epochs of a step; returns what to log of them. NonFiniteError as `Trained.update`."""
        logs: dict[str, list[float]] = defaultdict(list)
        for epoch in range(self._settings.epochs):
            for chosen in self._minibatches(len(experience.rollouts), step, epoch):
                weights = self._weights(experience, chosen, max_tokens)
                if not float(weights.sum()):
                    continue  # nothing in it is trained
                parts, micros = self._parts(experience, chosen, weights)
                found = {}
                if self.critic is not None:  # first: its graph may be there already, and then goes
                    fresh = experience.fresh_values
                    found = self._critic_step(self.critic, parts, micros, critic_lr, fresh)
                if trains_policy:
                    found |= self._policy_step(parts, micros, kl_coef, lr)
                for name, value in found.items():
                    logs[name].append(value)
        if experience.values is not None and experience.returns is not None:
            of = (experience.values, experience.returns, experience.layout.mask)
            logs["explained_variance"].append(explained_variance(*of))
        found = {name: _merged(name, values) for name, values in logs.items()}
        low, high = logs["clip_ratio/low_mean"], logs["clip_ratio/high_mean"]
        if low and high:
            found["clip_ratio/low_min"], found["clip_ratio/high_max"] = min(low), max(high)
            found["clip_ratio/region_mean"] = (sum(low) + sum(high)) / len(low)
        return found

    def _minibatches(self, count: int, step: int, epoch: int) -> Iterator[list[int]]:
        order = Permutation(count, mix(self._seed, step, epoch)) if count else None
        turn = [order(i) for i in range(count)] if order is not None else []
        number = min(self._settings.minibatches, count)
        for i in range(number):
            yield sorted(turn[count * i // number : count * (i + 1) // number])

    def _weights(self, experience: Experience, chosen: Sequence[int], max_tokens: int) -> Tensor:
        layout = _chosen_layout(experience.layout, chosen)
        return token_weights(layout, self._settings.aggregate, max_tokens)

    def _parts(
        self, experience: Experience, chosen: Sequence[int], weights: Tensor
    ) -> tuple[list[Part], int]:
        """This rank's micro-batches, and the most that a rank has: all sum gradients alike."""
        count, size = len(chosen), self.axis.size
        cuts = [
            _cut(experience, chosen, slice(count * i // size, count * (i + 1) // size),
                 self._settings.micro_tokens)
            for i in range(size)
        ]  # fmt: skip
        own = [_part(experience, members, weights, at) for members, at in cuts[self.axis.rank]]
        return own, max(map(len, cuts))

    def _policy_step(
        self, parts: Sequence[Part], micros: int, kl_coef: float, lr: float
    ) -> dict[str, float]:
        logs: dict[str, float] = defaultdict(float, {} if parts else dict.fromkeys(_SUMS, 0.0))
        self.policy.gradients.begin(micros + (self.ptx.num_micros if self.ptx else 0))
        for part in parts:
            self._policy_micro(part, kl_coef, logs)
            self.policy.gradients.add()
        if self.ptx is not None and self.axis.rank == 0:
            logs["ptx_loss"] = self.ptx.add(self.policy)
        self.policy.gradients.average(self.axis)
        logs["grad_norm"] = self.policy.update(lr, "policy", self.axis.size)
        return dict(logs)

    def _policy_micro(self, part: Part, kl_coef: float, logs: dict[str, float]) -> None:
        model: TrainModel = self.policy.model
        logprobs, entropy = completion_logprobs(
            model, part.rollouts, self._distribution, device=self._device
        )
        logprobs, entropy = logprobs.cpu(), entropy.cpu()
        correction = None
        if self._correction != "none":
            settings = self._settings
            correction = rollout_correction(
                part.layout, part.old, part.drawn, self._correction,
                settings.correction_high, settings.correction_low,
            )  # fmt: skip
        found = policy_loss(
            part.layout, logprobs, part.old, part.advantages, part.weights, self._loss, correction
        )
        loss = found.loss
        if part.ref is not None:
            kl = _kl(part, part.ref, logprobs, self._settings)
            logs["kl_loss"] += float(kl.detach())
            if kl_place(self._settings) == "loss" and kl_coef:
                loss = loss + kl_coef * kl
        mean_entropy = torch.where(part.layout.mask, part.weights * entropy, 0.0).sum()
        if self._settings.entropy_coef:
            loss = loss - self._settings.entropy_coef * mean_entropy
        torch.autograd.backward(loss)
        logs["loss"] += float(loss.detach())
        logs["entropy"] += float(mean_entropy.detach())
        logs["clip_ratio/low_mean"] += float(found.clipped_low)
        logs["clip_ratio/high_mean"] += float(found.clipped_high)
        logs["ratio/mean"] += float(found.ratio_mean)
        logs["ratio/max"] = max(logs.get("ratio/max", 0.0), float(found.ratio_max))
        logs["ratio/min"] = min(logs.get("ratio/min", math.inf), float(found.ratio_min))
        logs["approx_kl"] += float(found.approx_kl)

    def _critic_step(
        self,
        critic: Trained,
        parts: Sequence[Part],
        micros: int,
        lr: float,
        fresh: Tensor | None = None,
    ) -> dict[str, float]:
        """`fresh`: the values of the only part with a graph, by the critic as it is."""
        logs: dict[str, float] = defaultdict(float)
        critic.gradients.begin(micros)
        for part in parts:
            assert part.values is not None, "a critic was asked"
            assert part.returns is not None, "a critic was asked"
            values = fresh
            if values is None:
                values = values_of(critic.model, part.rollouts, self._device).cpu()
            loss, share = value_loss(
                values, part.values, part.returns, part.weights, self._settings.value_clip
            )
            torch.autograd.backward(loss)
            critic.gradients.add()
            logs["value_loss"] += float(loss.detach())
            logs["value_clip_ratio"] += float(share)
        critic.gradients.average(self.axis)
        logs["value_grad_norm"] = critic.update(lr, "critic", self.axis.size)
        return dict(logs)


@dataclass(frozen=True, slots=True)
class Part:
    """The completions of one micro-batch; fields [n] of the experience."""

    rollouts: tuple[Rollout, ...]
    layout: Layout
    weights: Tensor
    drawn: Tensor
    old: Tensor
    advantages: Tensor
    ref: Tensor | None
    values: Tensor | None
    returns: Tensor | None


def _kl(part: Part, ref: Tensor, logprobs: Tensor, settings: AlgorithmSection) -> Tensor:
    """The weighted KL to the reference: a scalar with a graph."""
    mask = part.layout.mask
    d = torch.where(mask, logprobs - ref, 0.0)
    kl = kl_estimate(d, torch.zeros_like(d), settings.kl_estimator)
    if settings.kl_unbiased and settings.kl_estimator != "k2":
        kl = kl * torch.where(mask, logprobs - part.old, 0.0).exp()
    return (part.weights * kl).sum()


def _rows(layout: Layout, chosen: Sequence[int]) -> Tensor:
    """[n] int64: the tokens of the chosen completions."""
    starts = layout.starts.tolist()
    parts = [torch.arange(starts[i], starts[i + 1]) for i in chosen]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _chosen_layout(layout: Layout, chosen: Sequence[int]) -> Layout:
    lengths = layout.starts.diff().tolist()
    return layout_of([lengths[i] for i in chosen], layout.mask[_rows(layout, chosen)])


def _cut(
    experience: Experience, chosen: Sequence[int], share: slice, micro_tokens: int
) -> list[tuple[list[int], int]]:
    """A share of the minibatch in micro-batches of at most `micro_tokens` tokens, prompts included.

    (completions, their first token's place in the minibatch) each.
    """
    sizes = [len(experience.rollouts[i].completion) for i in chosen]
    at, room = sum(sizes[: share.start]), 0
    cuts: list[tuple[list[int], int]] = []
    for i, length in zip(chosen[share], sizes[share], strict=True):
        rollout = experience.rollouts[i]
        size = added_tokens(rollout, experience.rollouts[cuts[-1][0][-1]] if cuts else None)
        if not cuts or size > room:
            cuts.append(([], at))
            room, size = micro_tokens, rollout.num_tokens
        cuts[-1][0].append(i)
        room -= size
        at += length
    return cuts


def _part(experience: Experience, members: Sequence[int], weights: Tensor, begin: int) -> Part:
    rows = _rows(experience.layout, members)
    take: Callable[[Tensor | None], Any] = lambda x: None if x is None else x[rows]  # noqa: E731
    return Part(
        rollouts=tuple(experience.rollouts[i] for i in members),
        layout=_chosen_layout(experience.layout, members),
        weights=weights[begin : begin + len(rows)],
        drawn=take(experience.rollout_logprobs),
        old=take(experience.old_logprobs),
        advantages=take(experience.advantages),
        ref=take(experience.ref_logprobs),
        values=take(experience.values),
        returns=take(experience.returns),
    )


def _merged(name: str, values: Sequence[float]) -> float:
    """Of the updates of a step: the extreme of an extreme, the mean of anything else."""
    if name.endswith("/max"):
        return max(values)
    return min(values) if name.endswith("/min") else sum(values) / len(values)
