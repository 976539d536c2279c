"""A step's rollouts with everything that training needs of them, and how it is computed.

The order is that of PPO: rewards of whole completions, log-probs of the reference, values of the
critic, token rewards, advantages. Nothing here changes a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sterna.align.advantage import (
    STD_EPS,
    gae,
    group_advantages,
    group_std,
    leave_one_out,
    token_rewards,
    whiten,
)
from sterna.align.config import AlgorithmSection
from sterna.align.flat import Layout
from sterna.align.reward import Rewards
from sterna.align.rollout import Rollout, completion_layout, group_ids, rollout_logprobs

# A model's numbers for every completion token of some rollouts: [N] float32, without a graph.
PerToken = Callable[[Sequence[Rollout]], Tensor]


@dataclass(frozen=True, slots=True)
class Models:
    """Who is asked about a step's rollouts; None = not needed by the settings."""

    policy: PerToken | None  # None: the rollout's own log-probs are the trainer's
    reference: PerToken | None
    critic: PerToken | None


@dataclass(frozen=True, slots=True)
class Experience:
    """B completions with N tokens, all [N] tensors on the CPU in the layout's order."""

    rollouts: tuple[Rollout, ...]
    layout: Layout
    rewards: Rewards  # of these completions
    scores: Tensor  # [B] float32: what the total became after clip and penalty
    rollout_logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    values: Tensor | None
    returns: Tensor | None
    advantages: Tensor
    fresh_values: Tensor | None = None  # `values` with their graph, where one update uses them all


def make_experience(
    rollouts: Sequence[Rollout],
    rewards: Rewards,
    models: Models,
    settings: AlgorithmSection,
    kl_coef: float,
) -> Experience:
    """Completions whose reward failed, or that nothing can be learnt from, are left out."""
    keep = [i for i, ok in enumerate(rewards.is_kept.tolist()) if ok]
    rollouts = tuple(rollouts[i] for i in keep)
    rewards = Rewards(
        rewards.total[keep], {n: v[keep] for n, v in rewards.parts.items()}, rewards.is_kept[keep]
    )
    layout = _trained(rollouts, settings)
    scores = _scores(rollouts, rewards.total, settings)
    drawn = rollout_logprobs(rollouts)
    old = drawn if models.policy is None else models.policy(rollouts)
    ref = None if models.reference is None else models.reference(rollouts)
    fresh = None if models.critic is None else models.critic(rollouts)
    values = None if fresh is None else fresh.detach()
    kl = torch.zeros_like(old) if ref is None else old - ref
    in_reward = kl_coef if kl_place(settings) == "reward" else 0.0
    returns, advantages = _advantages(
        layout, group_ids(rollouts), scores, in_reward, kl, values, settings
    )
    return Experience(
        rollouts, layout, rewards, scores, drawn, old, ref, values, returns, advantages,
        fresh if fresh is not None and fresh.requires_grad else None,
    )  # fmt: skip


def kl_place(settings: AlgorithmSection) -> str:
    """Where the KL to the reference is taken off: "reward" or "loss"."""
    if settings.kl_in != "auto":
        return settings.kl_in
    return "loss" if settings.kind == "grpo" else "reward"


def share_without_spread(rollouts: Sequence[Rollout], scores: Tensor) -> float:
    """The share of groups whose rewards are all equal: nothing is learnt from those."""
    if not len(scores):
        return 0.0
    groups = group_ids(rollouts)
    deviation = group_std(scores, groups)
    first = np.unique(groups.numpy(), return_index=True)[1]
    return float((deviation[torch.from_numpy(first)] < STD_EPS * 1e-2).float().mean())


def _trained(rollouts: Sequence[Rollout], settings: AlgorithmSection) -> Layout:
    """The layout; truncated completions lose their mask where the settings say so."""
    layout = completion_layout(rollouts)
    if not settings.mask_truncated:
        return layout
    whole = torch.tensor([not rollout.is_truncated for rollout in rollouts], dtype=torch.bool)
    return Layout(layout.starts, layout.mask & layout.spread(whole))


def _scores(rollouts: Sequence[Rollout], totals: Tensor, settings: AlgorithmSection) -> Tensor:
    """[B] float32: penalty for a missing end, then the clip."""
    truncated = torch.tensor([float(r.is_truncated) for r in rollouts], dtype=totals.dtype)
    scores = totals - settings.missing_eos_penalty * truncated
    if settings.reward_clip > 0:
        scores = scores.clamp(-settings.reward_clip, settings.reward_clip)
    return scores.float()


def _advantages(
    layout: Layout,
    groups: Tensor,
    scores: Tensor,
    kl_coef: float,
    kl: Tensor,
    values: Tensor | None,
    settings: AlgorithmSection,
) -> tuple[Tensor | None, Tensor]:
    """(returns of the critic or None, advantages), [N]."""
    if values is not None:
        rewards = token_rewards(layout, scores, kl, kl_coef)
        advantages, returns = gae(layout, rewards, values, settings.gamma, settings.lam)
        return returns, whiten(advantages, layout.mask) if settings.whiten else advantages
    if settings.kind == "distill":  # kl: to the teacher, where only sampled tokens are compared
        baseline = -kl[layout.mask].mean() if layout.mask.any() else 0.0
        return None, torch.where(layout.mask, -kl - baseline, 0.0)
    totals = scores - kl_coef * layout.sums(kl)
    if settings.kind == "rloo":
        each = leave_one_out(totals, groups)
    elif settings.kind == "grpo":
        each = group_advantages(totals, groups, settings.scale)
    else:
        each = totals
    advantages = torch.where(layout.mask, layout.spread(each), 0.0)
    if settings.kind == "reinforce" and settings.whiten:
        advantages = whiten(advantages, layout.mask)
    return None, advantages
