"""The figures of a step, by the names that TRL's users know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sterna.align.experience import Experience, share_without_spread
from sterna.align.rollout import Rollout, group_ids
from sterna.align.siblings import DraftCount

_GRAM = 4


def step_figures(
    experience: Experience,
    drawn: Sequence[Rollout],
    learnt: Mapping[str, float],
    seconds: Mapping[str, float],
) -> dict[str, float]:
    """`drawn`: all rollouts of the step, also those whose reward failed."""
    num_tokens = sum(len(rollout.completion) for rollout in drawn)
    found = {
        **reward_figures(experience),
        **completion_figures(drawn),
        **learnt,
        **mismatch_figures(experience),
        **group_figures(experience),
        "completions/dropped": float(len(drawn) - len(experience.rollouts)),
    }
    if experience.ref_logprobs is not None:
        d = experience.old_logprobs - experience.ref_logprobs
        found["kl"] = _mean(experience.layout.sums(d))
    if experience.values is not None:
        found |= ppo_figures(experience, found)
    total = max(sum(seconds.values()), 1e-9)
    found |= {f"time/{name}": round(value, 4) for name, value in seconds.items()}
    found["time/step"] = round(total, 4)
    found["tokens_per_s/generate"] = round(num_tokens / max(seconds["generate"], 1e-9), 1)
    found["samples_per_s"] = round(len(drawn) / total, 2)
    return found


# TRL's names of what PPO logs, and ours.
_OF_PPO = {
    "policy/approxkl_avg": "approx_kl",
    "policy/entropy_avg": "entropy",
    "loss/policy_avg": "loss",
    "loss/value_avg": "value_loss",
    "val/clipfrac_avg": "value_clip_ratio",
    "val/ratio": "ratio/mean",
    "objective/scores": "reward",
    "objective/kl": "kl",
}


def ppo_figures(experience: Experience, found: Mapping[str, float]) -> dict[str, float]:
    """The same again by the names of TRL's PPO, and those that only it has."""
    same = {name: found[own] for name, own in _OF_PPO.items() if own in found}
    kl = found.get("kl_coef", 0.0) * found.get("kl", 0.0)
    return {
        **same,
        "policy/clipfrac_avg": found.get("clip_ratio/region_mean", 0.0),
        "objective/entropy": -_mean(experience.layout.sums(experience.old_logprobs)),
        "objective/non_score_reward": -kl,
        "objective/rlhf_reward": found["reward"] - kl,
        "val/num_eos_tokens": float(sum(not r.is_truncated for r in experience.rollouts)),
    }


def reward_figures(experience: Experience) -> dict[str, float]:
    """Of the sum and of each part."""
    scores = experience.scores
    found = {"reward": _mean(scores), "reward_std": _std(scores)}
    for name, values in experience.rewards.parts.items():
        found |= {f"rewards/{name}/mean": _mean(values), f"rewards/{name}/std": _std(values)}
    return found


def group_figures(experience: Experience) -> dict[str, float]:
    """The share of groups that teach nothing; nothing is said of groups of one, which PPO has."""
    groups = group_ids(experience.rollouts)
    if not len(groups) or int(groups.bincount().max()) < 2:
        return {}
    share = share_without_spread(experience.rollouts, experience.scores)
    return {"frac_reward_zero_std": share}


def completion_figures(drawn: Sequence[Rollout]) -> dict[str, float]:
    """Lengths (tools' answers not counted), the share that did not end by itself, and how different
    they are.

    distinct_2 (arXiv 1510.03055): different pairs of neighbouring tokens over all such pairs.
    """
    lengths = torch.tensor([float(rollout.mask.sum()) for rollout in drawn])
    truncated = torch.tensor([rollout.is_truncated for rollout in drawn], dtype=torch.bool)
    return {
        **_spread(lengths, "length"),
        **_spread(lengths[~truncated], "terminated_length"),
        "completions/clipped_ratio": _mean(truncated),
        "completions/eos_ratio": 1.0 - _mean(truncated),
        "completions/repetition": _mean(torch.tensor([_repetition(r) for r in drawn])),
        "completions/distinct_2": _distinct_pairs(drawn),
        **tool_figures(drawn),
    }


def draft_figures(count: DraftCount) -> dict[str, float]:
    """Tokens guessed ahead, and those that were drawn."""
    return {
        "speculation/drafted": float(count.num_drafted),
        "speculation/accepted": float(count.num_accepted),
    }


def _spread(lengths: Tensor, what: str) -> dict[str, float]:
    return {
        f"completions/mean_{what}": _mean(lengths),
        f"completions/min_{what}": float(lengths.min()) if len(lengths) else 0.0,
        f"completions/max_{what}": float(lengths.max()) if len(lengths) else 0.0,
    }


def _repetition(rollout: Rollout) -> float:
    """The share of the policy's 4-grams that it has written before in this completion."""
    written = rollout.completion[rollout.mask].tolist()
    grams = list(zip(*(written[i:] for i in range(_GRAM)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def tool_figures(drawn: Sequence[Rollout]) -> dict[str, float]:
    """Calls a completion, and the share of calls that gave an error; nothing without tools."""
    calls = sum(rollout.tool_calls for rollout in drawn)
    errors = sum(rollout.tool_errors for rollout in drawn)
    if not calls:
        return {}
    return {"tools/call_frequency": calls / len(drawn), "tools/failure_frequency": errors / calls}


def _distinct_pairs(drawn: Sequence[Rollout]) -> float:
    """1 where there is no pair: nothing is said twice."""
    lines = [rollout.completion.astype(np.int64) for rollout in drawn]
    pairs = [(line[:-1] << 32) | line[1:] for line in lines if len(line) > 1]
    if not pairs:
        return 1.0
    joined = np.concatenate(pairs)
    return len(np.unique(joined)) / len(joined)


def mismatch_figures(experience: Experience) -> dict[str, float]:
    """Of the trainer's log-probs against the rollouts': 0 and 1 where both are equal bits."""
    mask = experience.layout.mask
    gap = (experience.old_logprobs - experience.rollout_logprobs)[mask].double()
    if not len(gap):
        return {}
    ratio = gap.exp()
    return {
        "sampling/sampling_logp_difference/mean": float(gap.abs().mean()),
        "sampling/sampling_logp_difference/max": float(gap.abs().max()),
        "sampling/importance_sampling_ratio/min": float(ratio.min()),
        "sampling/importance_sampling_ratio/mean": float(ratio.mean()),
        "sampling/importance_sampling_ratio/max": float(ratio.max()),
    }


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else 0.0


def _std(values: Tensor) -> float:
    return float(values.double().std()) if len(values) > 1 else 0.0
