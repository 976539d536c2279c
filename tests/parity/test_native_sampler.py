"""The native draw against its numpy reference.

The two sum in different orders, so a uniform within rounding of a border may fall to the
neighbour; with 24-bit sums that is less than one draw in 10,000. Everything else must be equal.
"""

from __future__ import annotations

import numpy as np
import pytest

from sterna.engine.request import SamplingParams
from sterna.engine.rng import uniform
from sterna.engine.sampler import RowPlan, reference_draw
from sterna.kernels.load import load_kernels
from sterna.kernels.sampling import Draw, draw, draw_scored
from sterna.kernels.scores import Distribution, score

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 1.0, "top_k": 400},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.7, "top_p": 0.05},
    {"temperature": 1.0, "min_p": 0.02},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.001},
]


@pytest.fixture(autouse=True)
def _native():
    if load_kernels().level != "cpu":
        pytest.skip("no native sampler on the reference kernels")


def rows(count, vocab, scale=3.0):
    return np.random.default_rng(0).normal(0, scale, (count, vocab)).astype(np.float32)


def as_draw(row, params, seed, position):
    share = uniform(seed, 0, position)
    return Draw(row, params.temperature, params.top_k, params.top_p, params.min_p, share)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("vocab", [37, 1000, 49152])
def test_draws_equal_the_reference(settings, vocab):
    params = SamplingParams(**settings)
    logits, count = rows(8, vocab), 400 if vocab < 49152 else 60
    differ = 0
    for position in range(0, count, 8):
        draws = [as_draw(i, params, 5, position + i) for i in range(8)]
        tokens = draw(logits, draws)
        for i, token in enumerate(tokens):
            plan = RowPlan(params, 5, 0, np.zeros(0, np.int32), [0] * (position + i))
            differ += token != reference_draw(logits[i], plan)
    assert differ <= 1


def test_greedy_takes_the_lowest_of_equal_maxima():
    logits = rows(3, 500)
    logits[1, [40, 7, 300]] = 99.0
    tokens = draw(logits, [Draw(i, 0.0, 0, 1.0, 0.0, 0.5) for i in (1, 0, 2, 1)])
    assert tokens == [7, int(logits[0].argmax()), int(logits[2].argmax()), 7]


def test_rows_that_are_not_finite_are_told_and_harm_no_other():
    logits = rows(4, 300)
    logits[1, 299] = np.nan
    logits[2, 0] = np.inf
    logits[3] = -np.inf
    tokens = draw(logits, [Draw(i, 1.0, 0, 0.9, 0.0, 0.5) for i in range(4)])
    assert tokens[0] >= 0 and tokens[1:] == [-1, -1, -1]


def test_masked_tokens_are_never_drawn():
    logits = rows(1, 200)
    logits[0, 3:] = -np.inf
    for share in (0.0, 0.3, 0.999999999999):
        for top_p in (1.0, 0.5):
            assert draw(logits, [Draw(0, 1.0, 0, top_p, 0.0, share)])[0] < 3


def test_frequencies_are_those_of_the_softmax():
    """Chi-square over 20,000 draws of 12 tokens; 31.3 is the 0.1 % point of 11 degrees."""
    logits = rows(1, 12, 1.0)
    draws = [Draw(0, 1.0, 0, 1.0, 0.0, uniform(9, 0, i)) for i in range(20_000)]
    seen = np.bincount(draw(logits, draws), minlength=12)
    want = np.exp(logits[0].astype(np.float64))
    want *= 20_000 / want.sum()
    assert ((seen - want) ** 2 / want).sum() < 31.3


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("vocab", [37, 1000, 49152])
def test_the_draw_says_the_bits_of_the_score(settings, vocab):
    """So that a rollout's log-probs, which come with the draw, are the trainer's."""
    params, logits = SamplingParams(**settings), rows(6, vocab)
    draws = [as_draw(i, params, 3, i) for i in range(6)]
    found = draw_scored(logits, draws)
    tokens = np.array([one.token_id for one in found], np.int32)
    assert tokens.tolist() == draw(logits, draws)
    of = Distribution(params.temperature, params.top_k, params.top_p, params.min_p)
    assert [one.logprob for one in found] == score(logits, tokens, [of]).logprobs.tolist()
    chosen = logits[np.arange(6), tokens]
    assert [one.rank for one in found] == (1 + (logits > chosen[:, None]).sum(1)).tolist()


def test_a_broken_row_has_no_logprob():
    logits = rows(2, 300)
    logits[0, 7] = np.nan
    broken, sound = draw_scored(logits, [Draw(i, 1.0, 0, 1.0, 0.0, 0.5) for i in range(2)])
    assert broken.token_id == -1 and np.isnan(broken.logprob)
    assert sound.token_id >= 0 and sound.logprob < 0
