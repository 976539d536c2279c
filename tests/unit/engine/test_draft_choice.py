"""How much is guessed: the cost model, the correction of probabilities, the choice."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from sterna.core.errors import ConfigError
from sterna.engine.config import EngineConfig
from sterna.engine.draft_rows import Batch, Offer
from sterna.engine.drafters.choose import drafter_names
from sterna.engine.stepcost import CostPoint, StepCost
from sterna.engine.trust import Trust
from sterna.engine.worth import time_left, worths

# Like a small model on two cores: weights are read in 2 ms, a row costs 0.25 ms, a key 0.5 us.
COST = StepCost([CostPoint(n, 2e-3 + 2.5e-4 * n, 5e-7 * n) for n in (1, 64)])


@dataclass(eq=False)
class Decode:
    order: tuple[int, int, int]
    num_computed: int
    num_left: int = 100


RICH = {"x": 1e9}


def decodes(count, num_keys=100):
    return [Decode((0, i, 0), num_keys) for i in range(count)]


def test_a_source_that_boasts_is_believed_less():
    trust = Trust()
    for i in range(300):
        trust.note(i, "boaster", [0.9], [i % 10 == 0])
        trust.note(i, "honest", [0.9], [i % 10 != 0])
    (boasted,), (honest,) = (trust.reach("new", s, [0.9]) for s in ("boaster", "honest"))
    assert boasted < 0.2
    assert honest == pytest.approx(0.9, abs=0.05)


def test_a_sequence_that_surprises_is_believed_less_and_gets_another_chance():
    trust = Trust()
    for _ in range(20):
        trust.note("odd", "suffix", [0.8], [False])
        for _ in range(5):
            trust.note("usual", "suffix", [0.8], [True])
    before = trust.reach("odd", "suffix", [0.8])[0]
    assert before < 0.5 * trust.reach("usual", "suffix", [0.8])[0]
    for _ in range(300):
        trust.fade("odd")
    assert trust.reach("odd", "suffix", [0.8])[0] > 1.5 * before


def test_a_lone_request_drafts_long_and_a_full_batch_hardly():
    lengths = []
    for count in (1, 8, 64):
        seqs = decodes(count)
        batch = Batch(COST, seqs, 0)
        offers = {seq: Offer([0.85**i for i in range(1, 17)], "x") for seq in seqs}
        lengths.append(sum(batch.choose(offers, 128, RICH).values()) / count)
    assert lengths[0] >= 5
    assert lengths[0] > lengths[1] >= lengths[2]
    assert lengths[2] < 1


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_raises_the_estimated_rate_or_is_none(seed):
    rng = random.Random(seed)
    seqs = decodes(rng.randint(1, 12), rng.randint(10, 2000))
    others = rng.choice([0, 0, 5, 200])
    batch = Batch(COST, seqs, others)
    reach = {}
    for seq in seqs:
        p, found = 1.0, []
        for _ in range(rng.randint(1, 16)):
            p *= rng.random() ** 0.3
            found.append(p)
        reach[seq] = found
    offers = {seq: Offer(found, "x") for seq, found in reach.items()}
    lengths = batch.choose(offers, 128, RICH)
    rows = len(seqs) + others
    keys = sum(seq.num_computed for seq in seqs)
    plain = rows / COST.seconds(rows, keys)
    if lengths:
        gained = sum(sum(reach[seq][:n]) for seq, n in lengths.items())
        more = sum(lengths.values())
        keys += sum(n * seq.num_computed for seq, n in lengths.items())
        assert (rows + gained) / COST.seconds(rows + more, keys) > 1.02 * plain


def test_no_drafter_is_asked_where_even_right_drafts_do_not_pay():
    seqs = decodes(4)
    flat = StepCost([CostPoint(n, 1e-3 * n) for n in (1, 64)])  # arithmetic from the first row on
    assert Batch(flat, seqs).least() >= 1
    assert Batch(COST, seqs).least() < 0.9


def test_rows_are_taken_as_far_as_the_account_covers_them():
    (seq,) = seqs = decodes(1)
    offers = {seq: Offer([0.99**i for i in range(1, 33)], "x")}
    batch = Batch(COST, seqs)
    for num_rows in (0, 3, 10):
        left_s = {"x": batch.rows_s(num_rows) + 1e-6}
        assert sum(batch.choose(offers, 128, left_s).values()) == num_rows


def test_in_a_batch_that_nobody_joins_who_is_ahead_is_not_helped_further():
    """Whoever ends first leaves the others as slow; the last one's tokens are worth whole steps."""
    seqs = decodes(8)
    for seq, left in zip(seqs, [20, *[100] * 6, 150], strict=True):
        seq.num_left = left
    offers = {seq: Offer([0.9**i for i in range(1, 9)], "x") for seq in seqs}
    found = Batch(COST, seqs, is_queue=False).choose(offers, 128, RICH)
    assert seqs[0] not in found
    assert found[seqs[7]] == 8
    assert set(Batch(COST, seqs, is_queue=True).choose(offers, 128, RICH)) == set(seqs)


@pytest.mark.parametrize("seed", range(20))
def test_the_time_left_is_that_of_playing_it(seed):
    rng = random.Random(seed)
    lefts = [rng.randrange(40) for _ in range(rng.randint(1, 9))]
    played, now = 0.0, list(lefts)
    while alive := [left for left in now if left]:
        played += 1 + len(alive) ** 0.5
        now = [left - 1 for left in alive]
    assert time_left(lefts, lambda n: 1 + n**0.5) == pytest.approx(played)
    lefts = [left + 1 for left in lefts]
    assert sum(worths(lefts, lambda n: 1 + n**0.5)) >= 0


def test_what_all_tokens_are_worth_is_a_step():
    for lefts in ([5, 5, 5], [1, 50, 100], [10, 10, 90, 91]):
        found = worths(lefts, lambda n: 2.0 + n)
        assert sum(found) == pytest.approx(len(lefts))
        assert found == sorted(found)


def test_the_setting_names_drafters():
    assert drafter_names(EngineConfig()) == []
    assert drafter_names(EngineConfig(speculation="auto")) == ["suffix"]
    assert drafter_names(EngineConfig(speculation="auto", draft_model="x")) == ["suffix", "model"]
    assert drafter_names(EngineConfig(speculation="ngram, suffix")) == ["ngram", "suffix"]
    for bad in ({"speculation": "sufix"}, {"speculation": "ngram,ngram"}, {"speculation": "model"}):
        with pytest.raises(ConfigError):
            drafter_names(EngineConfig(**bad))
