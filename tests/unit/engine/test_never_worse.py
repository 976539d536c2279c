"""Speculation does not lose: whole runs on a simulated machine, against plain decoding.

The machine's true step costs, what asking takes, and how often drafts come true are given; the
Speculator is the real one, its clock a false one. All runs start without any experience. Real
engines are compared by bench/speculate.py.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from sterna.engine.config import EngineConfig
from sterna.engine.drafters.base import Draft
from sterna.engine.speculate import Speculator
from sterna.engine.stepcost import CostPoint, StepCost

LENGTH, ROUNDS, VOCAB = 160, 8, 1000
# SmolLM2-135M in FP6 on two cores, milliseconds: 1 row 2.1, 8 rows 3.6, 32 rows 9.8.
TRUE = {1: 2.1, 2: 2.1, 3: 2.6, 4: 2.8, 8: 3.6, 16: 5.6, 32: 9.8, 64: 19.0}
FLAT = dict.fromkeys(TRUE, 2.1)  # what a wrong measurement says: rows cost nothing
CHEAP = {n: 2.1 + 0.3 * (ms - 2.1) for n, ms in TRUE.items()}


def cost_of(table):
    return StepCost([CostPoint(n, ms * 1e-3, 2e-8 * n) for n, ms in table.items()])


class Seq(SimpleNamespace):
    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


class Guesser:
    """Each draft token is right with chance `hit(now)`, announced as `said`; asking takes time."""

    def __init__(self, clock, rng, name, hit, said, num, ask_s, ask_each_s=0.0):
        self.clock, self.rng, self.name = clock, rng, name
        self.hit, self.said, self.num = hit, said, num
        self.ask_s, self.ask_each_s = ask_s, ask_each_s

    def start(self, seq):
        pass

    finish = start

    def extend(self, seq, tokens):
        pass

    def propose(self, seqs, limits):
        self.clock[0] += self.ask_s + self.ask_each_s * sum(n > 0 for n in limits)
        return [self._draft(seq, n) if n else None for seq, n in zip(seqs, limits, strict=True)]

    def _draft(self, seq, limit):
        place, count = len(seq.output), min(limit, self.num)
        chance = self.hit(self.clock[0])
        tokens = [
            token if self.rng.random() < chance else token + 1
            for token in seq.truth[place : place + count]
        ]
        return Draft(tokens, [self.said] * len(tokens), self.name)


class Head(Guesser):
    """A drafter on hidden states."""

    @property
    def num_drafts(self):
        return self.num

    def observe(self, seq, hidden):
        pass


def ratio(monkeypatch, drafters, batch, believed=TRUE, noise=0.0, seed=0):
    """Plain seconds by speculating seconds of ROUNDS times `batch` answers."""
    rng, clock = random.Random(seed), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    true = cost_of(TRUE)
    made = [kind(clock, rng, *args) for kind, *args in drafters]
    spec = Speculator(made, EngineConfig(num_draft_tokens=32), cost_of(believed))
    plain_s = 0.0
    for round_idx in range(ROUNDS * 8 // batch):
        seqs = [new_seq(rng, (round_idx, i, 0)) for i in range(batch)]
        scheduler = SimpleNamespace(num_pending_prompt_tokens=0, token_budget=256, max_drafts=128)
        for i in range(LENGTH):
            plain_s += true.seconds(batch, batch * (100 + i))
        while live := [s for s in seqs if len(s.output) < LENGTH]:
            scheduler.running = live
            begun = clock[0]
            for seq in live:
                seq.draft = []
            spec.propose(scheduler)
            rows = sum(1 + len(s.draft) for s in live)
            keys = sum((1 + len(s.draft)) * s.num_computed for s in live)
            clock[0] += true.seconds(rows, keys) * (1 + noise * rng.random())
            chunks = [
                SimpleNamespace(num_tokens=1 + len(s.draft), start=s.num_computed) for s in live
            ]
            num_tokens = sum(advance(spec, seq) for seq in live)
            step = SimpleNamespace(
                chunks=chunks, num_prompt_tokens=0, num_decode_tokens=len(live),
                num_draft_tokens=rows - len(live),
            )  # fmt: skip
            spec.note_step(step, num_tokens, clock[0] - begun)
        for seq in seqs:
            spec.finish(seq)
    return plain_s * (1 + noise / 2) / clock[0]


def new_seq(rng, order):
    params = SimpleNamespace(speculation=None)
    state = SimpleNamespace(max_output=LENGTH, request=SimpleNamespace(params=params))
    truth = [rng.randrange(0, VOCAB, 2) for _ in range(LENGTH)]
    return Seq(order=order, state=state, output=[], truth=truth, grammar=None, may_draft=True,
               num_computed=100, draft=[])  # fmt: skip


def advance(spec, seq):
    place = len(seq.output)
    count = 0
    while count < len(seq.draft) and seq.draft[count] == seq.truth[place + count]:
        count += 1
    tokens = seq.truth[place : place + count + 1]
    seq.output.extend(tokens)
    seq.num_computed += len(tokens)
    spec.extend(seq, tokens, len(seq.draft), 0)
    return len(tokens)


def always(chance):
    return lambda now: chance


def in_turns(now):
    """Right for 0.4 s, wrong for 0.4 s."""
    return 0.9 if int(now / 0.4) % 2 else 0.05


SUFFIX_S = 10e-6
MLP = (Head, "mlp", always(0.27), 0.3, 3, 0.22e-3, 0.05e-3)
DRAFTERS = {
    "a suffix tree that is always wrong and boasts": [
        (Guesser, "suffix", always(0.0), 0.9, 32, SUFFIX_S)
    ],
    "a suffix tree that is right now and then": [
        (Guesser, "suffix", always(0.3), 0.5, 32, SUFFIX_S)
    ],
    "a suffix tree that changes its luck": [(Guesser, "suffix", in_turns, 0.7, 32, SUFFIX_S)],
    "a weak MLP": [MLP],
    "a weak LSTM": [(Head, "lstm", always(0.29), 0.4, 3, 0.33e-3, 0.07e-3)],
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", DRAFTERS)
def test_never_below_097_of_plain(monkeypatch, name, batch):
    assert ratio(monkeypatch, DRAFTERS[name], batch) >= 0.97
    assert ratio(monkeypatch, DRAFTERS[name], batch, CHEAP, noise=0.5) >= 0.96
