"""What a completion is worth: one number of each reward, and their weighted sum.

A reward gets all samples of a step at once. A reward that raises, takes too long or gives NaN is
named with the sample; by its `on_error` the run stops (nothing was trained yet) or the completion
is left out of the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sterna.align.config import RewardSection
from sterna.align.rollout import Rollout
from sterna.core.errors import RewardError, SternaError
from sterna.core.log import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Sample:
    """A finished completion as rewards see it. `row`: the prompt's other columns."""

    prompt: str
    completion: str  # without the end token
    row: Mapping[str, Any]
    rollout: Rollout
    turns: tuple[str, ...] = ()  # what the policy wrote of it, without the tools' answers

    @property
    def answer(self) -> str:
        """The last turn: all of the completion where there are no tools."""
        return self.turns[-1] if self.turns else self.completion


class Reward(Protocol):
    """A number for each sample; the larger, the better."""

    name: str

    def __call__(self, samples: Sequence[Sample]) -> Sequence[float]:
        """One a sample, in order. What it raises is the run's or the sample's error, by setting."""
        ...


@dataclass(frozen=True, slots=True)
class Rewards:
    """What all rewards said of B samples."""

    total: Tensor  # [B] float64: the weighted sum
    parts: dict[str, Tensor]  # [B] each, unweighted; a gold metric of weight 0 is here only
    is_kept: Tensor  # [B] bool: false where a reward failed and the sample is left out


class RewardSum:
    """Named rewards with their settings."""

    def __init__(self, rewards: Sequence[tuple[Reward, RewardSection]]) -> None:
        names = [reward.name for reward, _ in rewards]
        self._rewards = [
            (f"{name}_{i}" if names.count(name) > 1 else name, *pair)
            for i, (name, pair) in enumerate(zip(names, rewards, strict=True))
        ]

    def __call__(self, samples: Sequence[Sample]) -> Rewards:
        """RewardError for a reward that fails, where its setting is to stop."""
        total = torch.zeros(len(samples), dtype=torch.float64)
        is_kept = torch.ones(len(samples), dtype=torch.bool)
        parts: dict[str, Tensor] = {}
        for name, reward, settings in self._rewards:
            values = _values(name, reward, samples, settings)
            good = values.isfinite()
            if not bool(good.all()):
                _refuse(name, values, samples, settings)
                is_kept &= good
            parts[name] = values
            if settings.weight:
                total += settings.weight * torch.where(good, values, 0.0)
        return Rewards(total, parts, is_kept)


def _values(
    name: str, reward: Reward, samples: Sequence[Sample], settings: RewardSection
) -> Tensor:
    """[B] float64; NaN for every sample when the reward raised and that is survived."""
    try:
        found = [float(value) for value in reward(samples)]
    except (SternaError, Exception) as error:
        if settings.on_error == "fail":
            raise RewardError(
                f"reward {name} raised {type(error).__name__}: {error}; mend it, or set its "
                'on_error = "drop" to leave such completions out'
            ) from error
        _log.warning("reward %s raised %r; its %d completions are left out", name, error,
                     len(samples))  # fmt: skip
        found = [math.nan] * len(samples)
    if len(found) != len(samples):
        raise RewardError(f"reward {name} gave {len(found)} numbers for {len(samples)} completions")
    return torch.tensor(found, dtype=torch.float64)


def _refuse(name: str, values: Tensor, samples: Sequence[Sample], settings: RewardSection) -> None:
    bad = (~values.isfinite()).nonzero()[:, 0].tolist()
    first = samples[bad[0]]
    what = f"{values[bad[0]].item()} for the completion {first.completion[:80]!r}"
    if settings.on_error == "fail":
        raise RewardError(
            f"reward {name} is {what} of the prompt {first.prompt[-80:]!r}; rewards are finite "
            'numbers: mend it, or set its on_error = "drop"'
        )
    _log.warning("reward %s is %s; %d of %d completions are left out", name, what, len(bad),
                 len(samples))  # fmt: skip
