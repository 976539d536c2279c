"""How much better a token or completion was than expected.

    GAE (arXiv 1506.02438)    delta_t = r_t + gamma V_(t+1) - V_t
                              A_t = delta_t + gamma lam A_(t+1)
                              over the trained tokens of one completion, V = A = 0 after its last
    group (GRPO)              (R_i - mean) / (std + 1e-4) over the completions of one prompt
    leave-one-out (RLOO)      R_i - mean of the others of its prompt (arXiv 2402.14740)
    whitened                  (A - mean) / std over all trained tokens

The reward of a completion stands at its last trained token, which is the EOS where one was
generated. Tokens that are not trained (tool output) are stepped over: no time passes in them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from sterna.align.flat import Layout
from sterna.core.errors import ConfigError

Scale = Literal["group", "batch", "none"]
# TRL's and verl's: groups of equal rewards get 0, not 0 / 0.
STD_EPS = 1e-4
_WHITEN_EPS = 1e-8


def token_rewards(
    layout: Layout, scores: Tensor, kl: Tensor, kl_coef: float, clip: float = 0.0
) -> Tensor:
    """Rewards [N]: -kl_coef * kl on each token, scores [B] (held within +-clip) on the last.

    A completion without a trained token gets nothing: there is no decision to reward.
    """
    if clip > 0:
        scores = scores.clamp(-clip, clip)
    rewards = torch.where(layout.mask, -kl_coef * kl, torch.zeros_like(kl))
    last = layout.last_tokens()
    has_any = last >= 0
    return rewards.index_add(0, last[has_any], scores[has_any].to(rewards.dtype))


def gae(
    layout: Layout, rewards: Tensor, values: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [N] from rewards and values [N]; 0 on tokens that are not trained."""
    advantages = torch.zeros_like(values)
    starts, mask = layout.starts.tolist(), layout.mask
    for begin, end in pairwise(starts):
        rows = begin + mask[begin:end].nonzero()[:, 0]
        advantages[rows] = _gae_one(rewards[rows], values[rows], gamma, lam)
    returns = torch.where(mask, advantages + values, torch.zeros_like(values))
    return advantages, returns


def _gae_one(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    after = torch.cat([values[1:], values.new_zeros(1)]) if len(values) else values
    deltas = (rewards + gamma * after - values).tolist()
    found, running = [0.0] * len(deltas), 0.0
    for t in range(len(deltas) - 1, -1, -1):
        running = deltas[t] + gamma * lam * running
        found[t] = running
    return values.new_tensor(found)


def group_advantages(rewards: Tensor, groups: Tensor, scale: Scale = "group") -> Tensor:
    """rewards [B] of completions of prompts groups [B] int64 -> [B].

    scale: divide by the group's deviation, the batch's (REINFORCE++), or not (Dr.GRPO). Deviations
    are unbiased (n - 1); a group of one has none and gets 0.
    """
    centred = rewards - _group_mean(rewards, groups)
    if scale == "none":
        return centred
    if scale == "batch":
        deviation = rewards.std() if len(rewards) > 1 else rewards.new_zeros(())
        return centred / (deviation + STD_EPS)
    return centred / (group_std(rewards, groups) + STD_EPS)


def group_std(rewards: Tensor, groups: Tensor) -> Tensor:
    """[B]: unbiased deviation of the rewards in each completion's group; 0 in a group of one."""
    centred = rewards - _group_mean(rewards, groups)
    counts = _group_sum(torch.ones_like(rewards), groups)
    return (_group_sum(centred.square(), groups) / (counts - 1).clamp(min=1)).sqrt()


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """[B]: the reward less the mean of the group's others. ConfigError for a group of one."""
    counts = _group_sum(torch.ones_like(rewards), groups)
    if bool((counts < 2).any()):
        raise ConfigError(
            "RLOO compares a completion with the others of its prompt, some prompt has just one; "
            "set the group size to 2 or more"
        )
    return (rewards - _group_mean(rewards, groups)) * counts / (counts - 1)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """values [N] with mean 0 and deviation 1 over the mask; the mean stays without `shift_mean`.

    Tokens outside the mask become 0. A batch of fewer than two trained tokens is not scaled.
    """
    kept = values[mask]
    if len(kept) < 2:
        return torch.where(mask, values, torch.zeros_like(values))
    mean = kept.mean()
    scaled = (values - mean) * torch.rsqrt(kept.var() + _WHITEN_EPS)
    scaled = scaled if shift_mean else scaled + mean
    return torch.where(mask, scaled, torch.zeros_like(values))


def _group_sum(values: Tensor, groups: Tensor) -> Tensor:
    """[B]: the sum over each completion's group."""
    size = int(groups.max()) + 1 if len(groups) else 0
    sums = values.new_zeros(size).index_add(0, groups, values)
    return sums[groups]


def _group_mean(rewards: Tensor, groups: Tensor) -> Tensor:
    return _group_sum(rewards, groups) / _group_sum(torch.ones_like(rewards), groups)
