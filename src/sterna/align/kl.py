"""Estimators of KL(policy || reference) from log-probs of the policy's own tokens.

With d = log pi - log ref of a sampled token (Schulman, "Approximating KL divergence", 2020):

    k1 = d                     unbiased, large variance
    k2 = d^2 / 2               biased, always >= 0
    k3 = exp(-d) - 1 + d       unbiased, always >= 0

Unbiased as numbers is not unbiased as losses. The mean gradient over samples of pi is 0 for k1,
that of KL(pi || ref) for k2, and that of KL(ref || pi) for k3. Multiplied by the ratio pi / pi_old,
k1 and k3 have the gradient of KL(pi || ref) too (DeepSeek-V3.2, arXiv 2512.02556; TRL's default).

d is held within +-20 in k3, where exp would overflow long before the estimate means anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
_MAX_LOG_RATIO = 20.0


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: Estimator = "k1") -> Tensor:
    """Per token [N], same shape and dtype as `logprobs`; differentiable in it."""
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    d = d.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return torch.expm1(-d) + d


@dataclass(slots=True)
class KLController:
    """The coefficient of the KL penalty; adaptive when `target` is set (arXiv 1909.08593, 2.2).

        coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon

    kl: nats a completion; n: completions since the last update.
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, num_completions: int) -> None:
        """Take note of the mean KL of a batch; nothing changes without a target."""
        if self.target is None:
            return
        error = min(0.2, max(-0.2, kl / self.target - 1.0))
        self.coef *= 1.0 + error * num_completions / self.horizon
