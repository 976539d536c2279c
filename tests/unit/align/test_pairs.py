"""Preference losses by hand, at their fixed points and by finite differences."""

import math

import pytest
import torch

from sterna.align.pairs import (
    kto_kl,
    kto_loss,
    preference_loss,
    reward_pair_loss,
    reward_token_loss,
)
from sterna.core.errors import ConfigError

F64 = torch.float64


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def test_equal_to_the_reference_the_loss_is_ln_2() -> None:
    l_c, l_r = t(-10.0, -3.0), t(-12.0, -1.0)
    losses, chosen, rejected = preference_loss(l_c, l_r, l_c, l_r, beta=0.1)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-15)
    assert chosen.tolist() == rejected.tolist() == [0.0, 0.0]


def test_dpo_cdpo_and_ipo_by_hand() -> None:
    args = (t(-1.0), t(-2.0), t(-1.5), t(-1.0))  # gap = 0.5 - (-1) = 1.5
    m = 0.2 * 1.5
    log_s = math.log(1 / (1 + math.exp(-m)))
    log_t = math.log(1 / (1 + math.exp(m)))
    assert float(preference_loss(*args, beta=0.2)[0]) == pytest.approx(-log_s)
    smooth = preference_loss(*args, beta=0.2, label_smoothing=0.1)[0]
    assert float(smooth) == pytest.approx(-0.9 * log_s - 0.1 * log_t)
    ipo = preference_loss(*args, beta=0.2, kind="ipo")[0]
    assert float(ipo) == pytest.approx((1.5 - 2.5) ** 2)
    with pytest.raises(ConfigError, match=r"0\.5"):
        preference_loss(*args, beta=0.2, label_smoothing=0.5)


def test_the_chosen_is_pushed_up_and_the_rejected_down() -> None:
    l_c, l_r = t(-1.0).requires_grad_(), t(-2.0).requires_grad_()
    losses, _, _ = preference_loss(l_c, l_r, t(-1.0), t(-2.0), beta=0.1)
    up, down = torch.autograd.grad(losses.sum(), (l_c, l_r))
    assert float(up) == pytest.approx(-0.05)
    assert float(down) == pytest.approx(0.05)


def test_kto_by_hand() -> None:
    z = kto_kl(t(-1.0, -2.0), t(-1.5, -2.1))
    assert float(z) == pytest.approx(0.3)
    assert float(kto_kl(t(-5.0), t(-1.0))) == 0.0
    losses = kto_loss(t(-1.0, -2.0), t(-2.0, -2.0), torch.tensor([True, False]), z, 0.5, 2.0, 3.0)
    s = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    wanted = [2.0 * (1 - s(0.5 * 0.7)), 3.0 * (1 - s(0.5 * 0.3))]
    assert losses.tolist() == pytest.approx(wanted)


def test_reward_pairs() -> None:
    losses = reward_pair_loss(t(2.0, 0.0), t(1.0, 0.0))
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1.0)), math.log(2)])
    margin = reward_pair_loss(t(2.0), t(1.0), t(1.0))
    assert float(margin) == pytest.approx(math.log(2))


def test_the_token_variant_starts_where_they_differ_and_ends_with_the_longer() -> None:
    chosen, rejected = t(9.0, 1.0, 2.0), t(9.0, 0.0)
    gaps = [1.0, 2.0]  # the rejected one goes on with 0
    wanted = sum(math.log(1 + math.exp(-g)) for g in gaps) / 2
    assert float(reward_token_loss(chosen, rejected, 1)) == pytest.approx(wanted)
    with pytest.raises(ConfigError, match="differ"):
        reward_token_loss(chosen, rejected, 3)
