"""The sampler against the textbook definition, row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sterna.core.errors import RequestError
from sterna.engine.request import SamplingParams
from sterna.engine.rng import uniform
from sterna.engine.sampler import RowPlan, sample, token_logprob

V = 50


def plan(output=(), prompt=(1, 2), sample_idx=0, bad_words=(), bitmask=None, end_ids=(), **params):
    return RowPlan(
        params=SamplingParams(**params),
        seed=params.get("seed") or 0,
        sample_idx=sample_idx,
        prompt=np.array(prompt, np.int32),
        output=list(output),
        end_ids=end_ids,
        bad_words=bad_words,
        bitmask=bitmask,
    )


def logits(rows=1, seed=0):
    return (np.random.default_rng(seed).standard_normal((rows, V)) * 3).astype(np.float32)


def one(row, **kwargs):
    return sample(row[None], [0], [plan(**kwargs)])[0]


def frequencies(row, count=20_000, **params):
    """Observed frequencies over `count` positions of one random stream."""
    drawn = np.zeros(V)
    p = plan(seed=5, **params)
    for _ in range(count):
        drawn[sample(row[None], [0], [p])[0].token_id] += 1
        p.output.append(0)  # the next position
    return drawn / count


def expected(row, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The definition, with a full sort."""
    probs = np.exp((row - row.max()).astype(np.float64) / temperature)
    probs[probs < min_p] = 0
    order = np.argsort(-probs, kind="stable")
    if top_k:
        probs[order[top_k:]] = 0
    probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= top_p]] = 0
    return probs / probs.sum()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"top_p": 1e-6},
        {"top_k": V + 7},
    ],
)
def test_distribution_is_the_defined_one(params):
    row = logits(seed=3)[0]
    want = expected(row, **params)
    got = frequencies(row, 4000, **params)
    assert not got[want == 0].any()
    # Five standard deviations of a binomial share, the bound for V comparisons.
    assert (np.abs(got - want) <= 5 * np.sqrt(want * (1 - want) / 4000) + 1e-9).all()


def test_greedy_takes_the_largest_and_the_smaller_id_of_equals():
    row = np.zeros(V, np.float32)
    row[[7, 9]] = 4
    assert one(row, temperature=0).token_id == 7
    assert one(row, temperature=0, logprobs=0).token_id == 7
    assert one(row, temperature=1e-6, top_p=0.5).token_id == 7


def test_rows_do_not_depend_on_their_companions():
    many = logits(12, seed=1)
    plans = [
        plan(seed=i, temperature=[0, 0.7, 1.0][i % 3], top_p=0.9, logprobs=2 if i % 2 else None)
        for i in range(12)
    ]
    together = sample(many, list(range(12)), plans)
    assert together == [sample(many[i : i + 1], [0], [plans[i]])[0] for i in range(12)]


def test_rows_may_be_shared_by_samples():
    row = logits()
    drawn = sample(row, [0] * 30, [plan(seed=1, sample_idx=i) for i in range(30)])
    assert len({choice.token_id for choice in drawn}) > 3


def test_uniform_is_a_function_of_its_name():
    values = {(s, i, p): uniform(s, i, p) for s in range(9) for i in range(9) for p in range(99)}
    assert len(set(values.values())) == len(values)
    assert all(0 <= value < 1 for value in values.values())
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0)  # seeds are 64 bits
    mean = sum(values.values()) / len(values)
    assert abs(mean - 0.5) < 5 / math.sqrt(12 * len(values))


def test_penalties():
    row = np.zeros(V, np.float32)
    row[:4] = [3.0, 2.9, -1.0, 2.0]
    # presence 1: token 0 falls below token 1
    assert one(row, temperature=0, output=[0], presence_penalty=1.0).token_id == 1
    # frequency counts: three times 0.2 lets 3 overtake 0 and 1
    kwargs = {"temperature": 0, "frequency_penalty": 0.4}
    assert one(row, output=[0, 0, 0, 1, 1, 1], **kwargs).token_id == 3
    # repetition sees the prompt too, divides positive logits and multiplies negative ones
    assert one(row, temperature=0, prompt=(0, 1), repetition_penalty=1.6).token_id == 3
    negative = np.full(V, -2.0, np.float32)
    negative[0] = -1.9
    assert one(negative, temperature=0, prompt=(0,), repetition_penalty=1.5).token_id == 1


def test_bias_allowed_banned():
    row = logits()[0]
    best = int(row.argmax())
    assert one(row, temperature=0, logit_bias={11: 100.0}).token_id == 11
    assert one(row, temperature=0, logit_bias={best: -100.0}).token_id != best
    assert one(row, temperature=0, allowed_token_ids=(4,)).token_id == 4
    assert one(row, temperature=0, bad_words=((best,),)).token_id != best
    banned_after = {"temperature": 0, "bad_words": ((8, 9, best),)}
    assert one(row, output=[1, 8, 9], **banned_after).token_id != best
    assert one(row, output=[8, 9, 1], **banned_after).token_id == best
    assert one(row, output=[9], **banned_after).token_id == best
    early = {"temperature": 0, "end_ids": (best,), "min_tokens": 2}
    assert one(row, output=[1], **early).token_id != best
    assert one(row, output=[1, 1], **early).token_id == best


def test_bitmask_and_a_conflict_with_bans():
    row = logits()[0]
    mask = np.zeros(2, np.int32)
    mask[1] = 1 << 3  # token 35 only
    assert one(row, temperature=0, bitmask=mask, logprobs=0).token_id == 35
    assert one(row, temperature=1.0, bitmask=mask).token_id == 35
    # the grammar allows nothing but the end: it wins over min_tokens
    forced = one(row, temperature=1.0, bitmask=mask, end_ids=(35,), min_tokens=5)
    assert forced.token_id == 35
    nothing = one(row, temperature=1.0, bitmask=np.zeros(2, np.int32))
    assert isinstance(nothing.error, RequestError)


def test_a_mask_shorter_than_the_row_forbids_the_padding():
    row = logits()[0]
    row[40] = 99
    mask = np.full(1, -1, np.int32)
    assert one(row, temperature=0, bitmask=mask, logprobs=0).token_id < 32


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 1.0}])
def test_broken_rows_fail_alone(bad, params):
    rows = logits(3)
    rows[1, 30] = bad
    drawn = sample(rows, [0, 1, 2], [plan(**params) for _ in range(3)])
    assert [choice.error is None for choice in drawn] == [True, False, True]
    rows[1] = -np.inf
    assert sample(rows, [1], [plan(**params)])[0].error is not None


def test_logprobs_are_of_the_raw_row():
    row = logits()[0]
    exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    found = one(row, temperature=0, logprobs=5, logit_bias={3: 100.0}).logprob
    assert found.token_id == 3
    assert found.logprob == pytest.approx(exact[3], abs=1e-5)  # float32 exp and logits of size 10
    assert found.rank == 1 + int((row > row[3]).sum())
    best = np.argsort(-row, kind="stable")[:5]
    assert [token for token, _ in found.top] == best.tolist()
    assert [value for _, value in found.top] == pytest.approx(exact[best], abs=1e-5)
    assert token_logprob(row, 3, 0).top == ()


@pytest.mark.parametrize("params", [{}, {"top_p": 0.8}, {"top_k": 40}, {"min_p": 0.01}])
@pytest.mark.parametrize("size", [64, 1000, 4096 + 17])
def test_large_vocabularies_take_the_same_token_as_a_plain_cdf(params, size):
    """The block-wise search against a running sum over all ids."""
    row = (np.random.default_rng(size).standard_normal(size) * 3).astype(np.float32)
    cdf = np.cumsum(expected(row, **params))
    for position in range(200):
        drawn = one(row, seed=3, output=[0] * position, **params).token_id
        point = uniform(3, 0, position)
        # equal but where the point is within rounding of a border
        assert cdf[drawn] > point - 1e-6
        assert drawn == 0 or cdf[drawn - 1] <= point + 1e-6


def test_top_of_a_large_row_with_ties():
    row = np.round(np.random.default_rng(0).standard_normal(5000) * 2).astype(np.float32)
    want = np.argsort(-row, kind="stable")[:20].tolist()
    assert [token for token, _ in token_logprob(row, 0, 20).top] == want
