"""Losses of on-policy learning, on the layout of flat.py; all are sums of weighted token losses.

With rho = exp(log pi - log pi_old) of a token, A its advantage, w its weight:

    clip (PPO, arXiv 1707.06347)   w max(-A rho, -A clip(rho, 1 - eps_low, 1 + eps_high))
                                   DAPO's clip-higher is eps_high > eps_low
    dual clip (arXiv 1912.09729)   for A < 0 never more than -A dual_clip
    sequence ratio (GSPO,          rho of a token := exp(mean of log pi - log pi_old over its
      arXiv 2507.18071)            completion)
    cispo (arXiv 2506.13585)       -w stop(min(rho, 1 + eps_high)) A log pi
    value                          w/2 max((V - R)^2, (clip(V, V_old +- clip) - R)^2)

Where rollouts came from other weights or another precision than the trainer's, each token's loss is
multiplied by a correction of c = exp(log pi_old - log pi_rollout): see `rollout_correction`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sterna.align.flat import Layout

Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True, slots=True)
class PolicyLossSettings:
    """How a policy's loss is clipped."""

    kind: Literal["clip", "cispo"] = "clip"
    ratio: Literal["token", "sequence"] = "token"
    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float = 0.0  # above 1 to be on


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The loss to differentiate, and what to log of it (sums weighted as the loss, no graph)."""

    loss: Tensor  # scalar
    clipped_low: Tensor  # share of weight whose ratio was held from below, and counted
    clipped_high: Tensor
    ratio_mean: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    approx_kl: Tensor  # k3 of old against new


def policy_loss(
    layout: Layout,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    settings: PolicyLossSettings,
    correction: Tensor | None = None,
) -> PolicyLoss:
    """All inputs [N]; gradients flow into `logprobs` only. See the module for the formulae."""
    # 0 where nothing is trained: such a token may have a log-prob of -inf, and 0 * inf is NaN.
    log_ratio = torch.where(layout.mask, logprobs - old_logprobs, 0.0)
    ratio = _ratio(layout, log_ratio, settings)
    low, high = 1.0 - settings.eps_low, 1.0 + settings.eps_high
    if settings.kind == "cispo":
        losses = (
            -ratio.detach().clamp(max=high) * advantages * torch.where(layout.mask, logprobs, 0)
        )
    else:
        losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
        if settings.dual_clip > 1.0:
            bound = -advantages * settings.dual_clip
            losses = torch.where(advantages < 0, torch.minimum(losses, bound), losses)
    if correction is not None:
        losses = losses * correction
    return PolicyLoss(
        (losses * weights).sum(), *_stats(layout, ratio, log_ratio, advantages, weights, low, high)
    )


def _ratio(layout: Layout, log_ratio: Tensor, settings: PolicyLossSettings) -> Tensor:
    if settings.ratio == "token":
        return log_ratio.exp()
    return layout.spread(layout.means(log_ratio)).exp()


@torch.no_grad()
def _stats(
    layout: Layout,
    ratio: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    weights: Tensor,
    low: float,
    high: float,
) -> tuple[Tensor, ...]:
    is_low = (ratio < low) & (advantages < 0)
    is_high = (ratio > high) & (advantages > 0)
    trained = ratio[layout.mask]
    if not len(trained):
        trained = ratio.new_ones(1)
    kl = torch.expm1(log_ratio) - log_ratio
    return (
        (weights * is_low).sum(),
        (weights * is_high).sum(),
        (weights * ratio).sum(),
        trained.min(),
        trained.max(),
        (weights * kl).sum(),
    )


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """(loss, clipped share of weight); all inputs [N]. clip = 0: plain squares.

    Half the squared error, the larger of that of V and of V held near the value at rollout time.
    """
    error = (values - returns).square()
    if clip <= 0:
        return 0.5 * (weights * error).sum(), weights.new_zeros(())
    held = old_values + (values - old_values).clamp(-clip, clip)
    held_error = (held - returns).square()
    share = (weights * (held_error > error)).sum().detach()
    return 0.5 * (weights * torch.maximum(error, held_error)).sum(), share


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(R - V) / Var(R) over the trained tokens; NaN where returns do not vary."""
    v, r = values[mask].double(), returns[mask].double()
    variance = float(r.var(correction=0)) if len(r) else 0.0
    return 1.0 - float((r - v).var(correction=0)) / variance if variance > 0 else float("nan")


@torch.no_grad()
def rollout_correction(
    layout: Layout,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    kind: Correction,
    high: float = 2.0,
    low: float = 0.0,
) -> Tensor:
    """[N]: what to multiply each token's loss by, with c = exp(old - rollout).

        token_truncate     min(c, high)                               (TIS)
        token_mask         c where low <= c <= high, else 0           (IcePop)
        sequence_truncate  min(product of c over the completion, high)
        sequence_mask      product of c where within [low, high], else 0

    1 everywhere for `none`, and exactly 1 where both log-probs are the same bits.
    """
    log_c = torch.where(layout.mask, old_logprobs - rollout_logprobs, 0.0)
    if kind == "none":
        return torch.ones_like(log_c)
    c = log_c.exp() if kind.startswith("token") else layout.spread(layout.sums(log_c)).exp()
    if kind.endswith("truncate"):
        return c.clamp(max=high)
    return torch.where((c >= low) & (c <= high), c, torch.zeros_like(c))
