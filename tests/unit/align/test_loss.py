"""Losses: gradients by finite differences in float64, identities, values by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sterna.align.flat import Layout, layout_of, token_weights
from sterna.align.kl import KLController, kl_estimate
from sterna.align.loss import (
    PolicyLossSettings,
    explained_variance,
    policy_loss,
    rollout_correction,
    value_loss,
)

F64 = torch.float64
MASK = torch.tensor([1, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
# The clips in use: PPO's, DAPO's, dual, GSPO's narrow sequence ratio, CISPO.
SETTINGS = [
    PolicyLossSettings(),
    PolicyLossSettings(eps_high=0.28),
    PolicyLossSettings(dual_clip=1.5),
    PolicyLossSettings(ratio="sequence", eps_low=0.05, eps_high=0.05),
]


def tensors(seed: int = 0) -> tuple[Layout, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layout = layout_of([4, 3], MASK)
    new = torch.randn(7, dtype=F64, generator=generator) * 0.4 - 1.0
    old = new + 0.3 * torch.randn(7, dtype=F64, generator=generator)
    advantages = torch.randn(7, dtype=F64, generator=generator)
    return layout, new, old, advantages, token_weights(layout, "sequence").double()


def differences(f: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-6) -> Tensor:
    found = torch.zeros_like(x)
    for i in range(len(x)):
        step = torch.zeros_like(x)
        step[i] = h
        found[i] = (f(x + step) - f(x - step)) / (2 * h)
    return found


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_policy_gradients(settings: PolicyLossSettings, seed: int) -> None:
    layout, new, old, advantages, weights = tensors(seed)

    def loss(x: Tensor) -> Tensor:
        return policy_loss(layout, x, old, advantages, weights, settings).loss

    x = new.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(x), x)
    assert torch.allclose(grad, differences(loss, new), rtol=1e-6, atol=1e-9)
    assert grad[~MASK].tolist() == [0.0, 0.0]


def test_cispo_is_reinforce_with_a_held_ratio() -> None:
    layout, new, old, advantages, weights = tensors()
    x = new.clone().requires_grad_()
    settings = PolicyLossSettings(kind="cispo", eps_high=0.1)
    (grad,) = torch.autograd.grad(
        policy_loss(layout, x, old, advantages, weights, settings).loss, x
    )
    ratio = (new - old).exp().clamp(max=1.1)
    assert torch.allclose(grad, -weights * ratio * advantages)


def test_equal_policies_give_ratio_one_and_minus_the_mean_advantage() -> None:
    layout, new, _, advantages, weights = tensors()
    found = policy_loss(layout, new, new, advantages, weights, SETTINGS[0])
    assert float(found.loss) == pytest.approx(-float((weights * advantages).sum()), rel=1e-15)
    assert float(found.ratio_min) == float(found.ratio_max) == 1.0
    assert float(found.clipped_low) == float(found.clipped_high) == float(found.approx_kl) == 0.0


def test_what_nobody_trains_may_be_infinite() -> None:
    layout, new, old, advantages, weights = tensors()
    new[3] = -math.inf
    x = new.clone().requires_grad_()
    found = policy_loss(layout, x, old, advantages, weights, SETTINGS[0])
    (grad,) = torch.autograd.grad(found.loss, x)
    assert grad.isfinite().all()
    assert found.ratio_max.isfinite()


def test_micro_batches_add_up() -> None:
    layout, new, old, advantages, weights = tensors()
    whole = policy_loss(layout, new, old, advantages, weights, SETTINGS[0]).loss
    parts = [
        policy_loss(
            layout_of([n], MASK[at]), new[at], old[at], advantages[at], weights[at], SETTINGS[0]
        ).loss
        for n, at in ((4, slice(0, 4)), (3, slice(4, 7)))
    ]
    assert float(whole) == pytest.approx(float(sum(parts)), rel=1e-14)


def test_value_loss_takes_the_larger_error() -> None:
    values, old = torch.tensor([1.0, 0.1], dtype=F64), torch.zeros(2, dtype=F64)
    returns, weights = torch.tensor([2.0, 1.0], dtype=F64), torch.tensor([0.5, 0.5], dtype=F64)
    loss, share = value_loss(values, old, returns, weights, clip=0.2)
    assert float(loss) == pytest.approx(0.5 * (0.5 * 1.8**2 + 0.5 * 0.9**2))
    assert float(share) == 0.5
    plain, none = value_loss(values, old, returns, weights, clip=0.0)
    assert float(plain) == pytest.approx(0.5 * (0.5 * 1.0 + 0.5 * 0.81))
    assert float(none) == 0.0


def test_explained_variance() -> None:
    returns, mask = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([1, 1, 1, 0]).bool()
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.zeros(4), returns, mask) == pytest.approx(0.0)
    assert math.isnan(explained_variance(returns, torch.ones(4), mask))


def test_corrections() -> None:
    layout = layout_of([2, 2])
    rollout = torch.zeros(4)
    old = torch.tensor([math.log(3.0), 0.0, -1.0, 0.5])

    def found(kind: str, high: float, low: float = 0.0) -> list[float]:
        return rollout_correction(layout, old, rollout, kind, high, low).tolist()  # type: ignore[arg-type]

    assert found("token_truncate", 2.0) == pytest.approx([2.0, 1.0, math.exp(-1), math.exp(0.5)])
    assert found("token_mask", 2.0, 0.5) == pytest.approx([0.0, 1.0, 0.0, math.exp(0.5)])
    half = math.exp(-0.5)
    assert found("sequence_truncate", 2.0) == pytest.approx([2.0, 2.0, half, half])
    assert found("sequence_mask", 2.0) == pytest.approx([0.0, 0.0, half, half])
    same = rollout_correction(layout, old, old, "sequence_mask", 1.0, 1.0)
    assert same.tolist() == [1.0] * 4


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimators_have_the_right_mean(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(6, dtype=F64, generator=generator).log_softmax(0)
    q = torch.randn(6, dtype=F64, generator=generator).log_softmax(0)
    mean = (p.exp() * kl_estimate(p, q, kind)).sum()  # type: ignore[arg-type]
    assert float(mean) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-12)
    assert kl_estimate(p, p, kind).tolist() == [0.0] * 6  # type: ignore[arg-type]


def test_k2_gradient_is_that_of_the_kl() -> None:
    p = torch.tensor([0.2, -0.3, 0.4], dtype=F64, requires_grad=True)
    q = torch.tensor([0.1, 0.2, 0.3], dtype=F64).log_softmax(0)
    log_p = p.log_softmax(0)
    surrogate = (log_p.exp().detach() * kl_estimate(log_p, q, "k2")).sum()
    true = (log_p.exp() * (log_p - q)).sum()
    (a,) = torch.autograd.grad(surrogate, p, retain_graph=True)
    (b,) = torch.autograd.grad(true, p)
    assert torch.allclose(a, b, rtol=1e-10)


def test_the_controller_moves_towards_its_target() -> None:
    controller = KLController(0.1, target=6.0, horizon=100)
    controller.update(12.0, 10)
    assert controller.coef == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    controller.update(5.4, 10)
    assert controller.coef == pytest.approx(0.102 * (1 - 0.1 * 0.1))
    fixed = KLController(0.1)
    fixed.update(100.0, 10)
    assert fixed.coef == 0.1
