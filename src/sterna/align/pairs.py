"""Losses on recorded preferences: DPO and its kin, KTO, and the pair losses of a reward model.

l and l_ref are log-probs of a whole completion under the policy and the reference, c the chosen and
r the rejected one, m = beta [(l_c - lref_c) - (l_r - lref_r)]:

    sigmoid (DPO, arXiv 2305.18290)  -(1 - eps) log s(m) - eps log s(-m)     eps > 0 is cDPO
    ipo (arXiv 2310.12036)           (m / beta - 1 / (2 beta))^2             l averaged over tokens
    KTO (arXiv 2402.01306)           h = l - l_ref, z = max(0, mean h of mismatched pairs):
                                     w_d (1 - s(beta (h - z)))  desirable
                                     w_u (1 - s(beta (z - h)))  undesirable
    reward pair (Bradley-Terry)      -log s(r_c - r_r - margin)
    reward pair, each token          mean over t in [d, e) of -log s(r_c,t - r_r,t), d the first
      (DeepSpeed-Chat)               place where the two differ, e the end of the longer one
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sterna.core.errors import ConfigError

PairKind = Literal["sigmoid", "ipo"]


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    kind: PairKind = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, implicit reward of the chosen, of the rejected) [P], of log-probs [P].

    For `ipo` the log-probs are means over tokens, else sums; that is the caller's to do. Rewards
    (beta times the log ratio) have no graph. ConfigError for a smoothing of 0.5 or more.
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ConfigError(f"label_smoothing is {label_smoothing}; give 0 or more, below 0.5")
    gain_c, gain_r = chosen - ref_chosen, rejected - ref_rejected
    gap = gain_c - gain_r
    if kind == "ipo":
        losses = (gap - 1.0 / (2.0 * beta)).square()
    else:
        m = beta * gap
        losses = -(1.0 - label_smoothing) * F.logsigmoid(m) - label_smoothing * F.logsigmoid(-m)
    return losses, (beta * gain_c).detach(), (beta * gain_r).detach()


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    is_desirable: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Losses [B] of completions' summed log-probs [B]; kl: the scalar z, without a graph."""
    gain, z = logprobs - ref_logprobs, kl.detach()
    desirable = desirable_weight * (1.0 - torch.sigmoid(beta * (gain - z)))
    undesirable = undesirable_weight * (1.0 - torch.sigmoid(beta * (z - gain)))
    return torch.where(is_desirable, desirable, undesirable)


def kto_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """z: max(0, mean log ratio) of mismatched prompts and completions [B]; 0 without any."""
    if not len(logprobs):
        return logprobs.new_zeros(())
    return (logprobs - ref_logprobs).mean().clamp(min=0).detach()


def reward_pair_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """Losses [P] of the scores at the last real token (the EOS where there is one)."""
    gap = chosen - rejected
    return -F.logsigmoid(gap if margin is None else gap - margin)


def reward_token_loss(chosen: Tensor, rejected: Tensor, first: int) -> Tensor:
    """Scalar loss of one pair: scores at every token, [Tc] and [Tr], from token `first` on.

    The shorter one goes on with its last score: there is no padding here whose scores the original
    would take. ConfigError when they do not differ
    anywhere (`first` is beyond both).
    """
    end = max(len(chosen), len(rejected))
    if not 0 <= first < end:
        raise ConfigError(
            f"the two completions have to differ within their {end} tokens, first = {first}"
        )
    index = torch.arange(first, end, device=chosen.device)
    c = chosen[index.clamp(max=len(chosen) - 1)]
    r = rejected[index.clamp(max=len(rejected) - 1)]
    return -F.logsigmoid(c - r).mean()
