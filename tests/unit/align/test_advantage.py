"""Advantages against brute force and by hand."""

import pytest
import torch

from sterna.align import advantage
from sterna.align.flat import layout_of
from sterna.core.errors import ConfigError

F64 = torch.float64


def brute_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The double sum of the definition, O(n^2)."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * a - v for r, a, v in zip(rewards, after, values, strict=True)]
    n = len(deltas)
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.99, 0.0)])
def test_gae_is_its_definition_and_skips_tool_tokens(gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0], dtype=torch.bool)
    layout = layout_of([5, 1, 2], mask)
    rewards = torch.randn(8, dtype=F64, generator=generator)
    values = torch.randn(8, dtype=F64, generator=generator)
    found, returns = advantage.gae(layout, rewards, values, gamma, lam)
    rows = [0, 1, 3, 4]
    wanted = brute_gae(rewards[rows].tolist(), values[rows].tolist(), gamma, lam)
    assert torch.allclose(found[rows], torch.tensor(wanted, dtype=F64), rtol=1e-12)
    assert found[5] == rewards[5] - values[5]
    assert found[[2, 6, 7]].tolist() == returns[[2, 6, 7]].tolist() == [0, 0, 0]
    assert torch.equal(returns[rows], found[rows] + values[rows])


def test_the_score_stands_on_the_last_trained_token() -> None:
    mask = torch.tensor([1, 1, 1, 0, 0], dtype=torch.bool)
    layout = layout_of([2, 2, 1], mask)  # the second ends in tool output, the third has no action
    kl = torch.full((5,), 0.5)
    rewards = advantage.token_rewards(layout, torch.tensor([9.0, -9.0, 3.0]), kl, 0.1, clip=5.0)
    assert torch.allclose(rewards, torch.tensor([-0.05, 4.95, -5.05, 0.0, 0.0]))


def test_group_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0])
    groups = torch.tensor([0, 0, 1, 1])
    found = advantage.group_advantages(rewards, groups)
    scale = 2**0.5 + advantage.STD_EPS  # the unbiased deviation of (1, 3) is sqrt 2
    assert torch.allclose(found, torch.tensor([-1 / scale, 1 / scale, 0.0, 0.0]))
    assert advantage.group_advantages(rewards, groups, "none").tolist() == [-1, 1, 0, 0]
    batch = advantage.group_advantages(rewards, groups, "batch")
    assert torch.allclose(batch[1], 1 / (rewards.std() + advantage.STD_EPS))
    alone = advantage.group_advantages(torch.tensor([7.0]), torch.tensor([0]))
    assert alone.tolist() == [0.0]


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0, 4.0, 8.0])
    groups = torch.tensor([0, 1, 0, 1, 0])
    found = advantage.leave_one_out(rewards, groups)
    assert torch.allclose(found, torch.tensor([1 - 7.0, 2 - 4.0, 6 - 4.5, 4 - 2.0, 8 - 3.5]))
    with pytest.raises(ConfigError, match="2 or more"):
        advantage.leave_one_out(rewards[:2], groups[:2])


def test_whitening() -> None:
    values, mask = torch.tensor([1.0, 2.0, 99.0, 6.0]), torch.tensor([1, 1, 0, 1]).bool()
    found = advantage.whiten(values, mask)
    assert found[2] == 0
    assert abs(float(found[mask].mean())) < 1e-6
    assert abs(float(found[mask].std()) - 1) < 1e-6
    kept = advantage.whiten(values, mask, shift_mean=False)
    assert torch.allclose(kept[mask] - found[mask], torch.full((3,), 3.0))
    assert advantage.whiten(values, torch.tensor([1, 0, 0, 0]).bool()).tolist() == [1, 0, 0, 0]
