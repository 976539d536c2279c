"""How much is guessed: the cost model, the correction of probabilities, the guard, the choice."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from sterna.core.errors import ConfigError
from sterna.engine.config import EngineConfig
from sterna.engine.draft_rows import Batch
from sterna.engine.drafters.choose import drafter_names
from sterna.engine.speculate import GUARD_STEPS, Guard
from sterna.engine.stepcost import CostPoint, StepCost
from sterna.engine.trust import Trust

# Like a small model on two cores: weights are read in 2 ms, a row costs 0.25 ms, a key 0.5 us.
COST = StepCost([CostPoint(n, 2e-3 + 2.5e-4 * n, 5e-7 * n) for n in (1, 64)])


@dataclass(eq=False)
class Decode:
    order: tuple[int, int, int]
    num_computed: int


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
        reach = {seq: [0.85**i for i in range(1, 17)] for seq in seqs}
        lengths.append(sum(batch.choose(reach, 128).values()) / count)
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
    lengths = batch.choose(reach, 128)
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
    assert not Batch(flat, seqs, 0).may_gain(4, 32)
    assert Batch(COST, seqs, 0).may_gain(4, 32)


def test_the_guard_pauses_what_loses():
    guard = Guard()
    for _ in range(GUARD_STEPS):
        guard.note(tokens=1.2, plain_tokens=1, seconds=1.5, plain_s=1.0)
    assert guard.is_paused()
    fine = Guard()
    for _ in range(10 * GUARD_STEPS):
        fine.note(tokens=2.0, plain_tokens=1, seconds=1.5, plain_s=1.0)
    assert not fine.is_paused()


def test_the_setting_names_drafters():
    assert drafter_names(EngineConfig()) == []
    assert drafter_names(EngineConfig(speculation="auto")) == ["suffix"]
    assert drafter_names(EngineConfig(speculation="auto", draft_model="x")) == ["suffix", "model"]
    assert drafter_names(EngineConfig(speculation="ngram, suffix")) == ["ngram", "suffix"]
    for bad in ({"speculation": "sufix"}, {"speculation": "ngram,ngram"}, {"speculation": "model"}):
        with pytest.raises(ConfigError):
            drafter_names(EngineConfig(**bad))
