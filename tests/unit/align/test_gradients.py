"""Every loss's gradient against finite differences in float64, 1e-6 relative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sterna.align.flat import layout_of, token_weights
from sterna.align.kl import kl_estimate
from sterna.align.loss import PolicyLossSettings, policy_loss, value_loss
from sterna.align.pairs import kto_loss, preference_loss, reward_pair_loss, reward_token_loss

F64 = torch.float64
N = 6


def draw(seed: int) -> Tensor:
    return torch.randn(N, dtype=F64, generator=torch.Generator().manual_seed(seed))


LAYOUT = layout_of([4, 2])
WEIGHTS = token_weights(LAYOUT, "sequence").double()
OLD, ADVANTAGES, REF = draw(1) * 0.3, draw(2), draw(3) * 0.5
IS_GOOD = torch.tensor([True, False, True, True, False, False])


def policy(x: Tensor) -> Tensor:
    return policy_loss(LAYOUT, x, OLD, ADVANTAGES, WEIGHTS, PolicyLossSettings()).loss


def value(x: Tensor) -> Tensor:
    return value_loss(x, OLD, ADVANTAGES, WEIGHTS, clip=0.2)[0]


def squares(x: Tensor) -> Tensor:
    return value_loss(x, OLD, ADVANTAGES, WEIGHTS, clip=0.0)[0]


def kl(kind: str, is_unbiased: bool) -> Callable[[Tensor], Tensor]:
    def loss(x: Tensor) -> Tensor:
        found = kl_estimate(x, REF, kind)  # type: ignore[arg-type]
        return (WEIGHTS * (found * (x - OLD).exp() if is_unbiased else found)).sum()

    return loss


def pairs(kind: str, smoothing: float) -> Callable[[Tensor], Tensor]:
    def loss(x: Tensor) -> Tensor:
        three = (x[:3], x[3:], REF[:3], REF[3:])
        losses = preference_loss(*three, 0.3, kind, smoothing)[0]  # type: ignore[arg-type]
        return losses.mean()

    return loss


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "policy": policy, "value": value, "value_squares": squares,
    **{f"{k}{'_unbiased' * b}": kl(k, b) for k in ("k1", "k2", "k3") for b in (False, True)},
    "dpo": pairs("sigmoid", 0.0), "cdpo": pairs("sigmoid", 0.1), "ipo": pairs("ipo", 0.0),
    "kto": lambda x: kto_loss(x, REF, IS_GOOD, torch.tensor(0.2, dtype=F64), 0.3, 1.5, 0.5).sum(),
    "reward_pair": lambda x: reward_pair_loss(x[:3], x[3:], REF[:3]).sum(),
    "reward_tokens": lambda x: reward_token_loss(x[:4], x[4:], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name: str) -> None:
    loss, at, h = LOSSES[name], draw(4) * 0.4, 1e-5
    x = at.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(x), x)
    steps = h * torch.eye(N, dtype=F64)
    wanted = torch.stack([(loss(at + s) - loss(at - s)) / (2 * h) for s in steps])
    assert torch.allclose(grad, wanted, rtol=1e-6, atol=1e-9)
