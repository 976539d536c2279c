"""Layouts and weights: a loss may not depend on how its batch is cut."""

import pytest
import torch

from sterna.align.flat import Layout, layout_of, token_weights
from sterna.core.errors import ConfigError


@pytest.fixture
def layout() -> Layout:
    # Lengths 3, 0, 2, 4: an empty completion, one with tool output inside, one all untrained.
    mask = torch.tensor([1, 0, 1, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    return layout_of([3, 0, 2, 4], mask)


def test_sums_means_and_last_tokens_skip_what_is_not_trained(layout: Layout) -> None:
    values = torch.arange(9.0)
    assert layout.sums(values).tolist() == [2.0, 0.0, 7.0, 0.0]
    assert layout.means(values).tolist() == [1.0, 0.0, 3.5, 0.0]
    assert layout.last_tokens().tolist() == [2, -1, 4, -1]
    assert layout.spread(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [1] * 3 + [3] * 2 + [4] * 4


def test_token_weights_sum_to_one(layout: Layout) -> None:
    weights = token_weights(layout, "token")
    assert weights.tolist() == [0.25, 0, 0.25, 0.25, 0.25, 0, 0, 0, 0]


def test_sequence_weights_give_each_completion_the_same(layout: Layout) -> None:
    weights = token_weights(layout, "sequence")
    sums = layout.sums(weights)
    assert sums.tolist() == [0.25, 0.0, 0.25, 0.0]


def test_fixed_weights_do_not_know_lengths(layout: Layout) -> None:
    weights = token_weights(layout, "fixed", max_length=5)
    assert torch.allclose(weights[layout.mask], torch.tensor(1 / 20))
    with pytest.raises(ConfigError, match="longest completion"):
        token_weights(layout, "fixed")
