"""A speculator that learns while serving: rows, rounds, swaps, and output that never changes."""

from __future__ import annotations

import time

import pytest
import torch
from tests.drafts import always_draft
from tests.parity.conftest import packed_batch
from tests.parity.test_learned import new_speculator
from tests.parity.test_speculation import (  # noqa: F401 - fixtures
    JOBS,
    VOCAB,
    folder,
    new_engine,
    run,
)
from torch.nn import functional as F

from sterna.data.pack import IGNORE
from sterna.engine.build import start_learning
from sterna.engine.drafters import learner as learner_module
from sterna.engine.drafters.draft_step import DraftStep
from sterna.engine.drafters.learned import LearnedDrafter
from sterna.engine.drafters.learner import Learner
from sterna.engine.drafters.ring import HELD_OUT_EVERY, Recorder, Ring
from sterna.model.load import load_model
from sterna.model.speculator_update import Base, draft_loss, num_accepted
from sterna.train.distill.speculator import SpeculatorPair


@pytest.fixture(scope="module")
def decoder(folder):  # noqa: F811
    decoder = load_model(folder, dtype="float32").decoder
    decoder.prepare_inference()
    return decoder


class Seq:
    def __init__(self):
        self.output = []

    def commit(self, recorder, tokens):
        """Each token's state is the token itself, three times."""
        self.output.extend(tokens)
        recorder.observe(self, torch.tensor(tokens, dtype=torch.float32)[:, None].repeat(1, 3))


def test_rows_are_states_with_the_tokens_that_followed():
    train, kept = Ring(4, 3, 4, torch.float32), Ring(4, 3, 4, torch.float32)
    recorder = Recorder(train, kept, 3)
    a, b = Seq(), Seq()
    a.commit(recorder, [1])
    b.commit(recorder, [50, 51])
    a.commit(recorder, [2, 3])
    assert len(train) == 0
    a.commit(recorder, [4])
    hidden, tokens = train.newest(9)
    assert tokens.tolist() == [[1, 2, 3, 4]] and hidden.tolist() == [[1.0] * 3]
    a.commit(recorder, [5, 6, 7, 8])
    hidden, tokens = train.newest(9)  # the ring holds four of five, the newest first
    assert tokens.tolist() == [[i, i + 1, i + 2, i + 3] for i in (5, 4, 3, 2)]
    assert hidden[:, 0].tolist() == [5, 4, 3, 2]
    for seq in (a, b):
        recorder.finish(seq)
    assert not recorder._open and len(kept) == 0


def test_every_eighth_sequence_is_kept_aside():
    train, kept = Ring(100, 3, 2, torch.float32), Ring(100, 3, 2, torch.float32)
    recorder = Recorder(train, kept, 1)
    for i in range(2 * HELD_OUT_EVERY):
        Seq().commit(recorder, [i, i])
    held_out = kept.newest(100)[1][:, 0].tolist()
    assert held_out == [15, 7]
    assert not set(held_out) & set(train.newest(100)[1][:, 0].tolist())


@pytest.mark.parametrize(("cell", "shares_base"), [("mlp", True), ("lstm", False)])
@pytest.mark.parametrize("draft_tokens", [(), tuple(range(0, VOCAB, 3))])
def test_loss_is_the_trainers_and_the_measure_is_what_is_served(
    folder,  # noqa: F811
    decoder,
    cell,
    shares_base,
    draft_tokens,
):
    plain = load_model(folder, dtype="float32").decoder
    made = new_speculator(plain, cell, shares_base, draft_tokens)
    pair = SpeculatorPair(plain, made.config)
    pair.speculator.load_state_dict(made.state_dict())
    torch.manual_seed(3)
    tokens = torch.randint(VOCAB, (44,), dtype=torch.int32)
    batch, num = packed_batch([tokens.tolist()]), 40
    rows = torch.stack([tokens[i + 1 : i + 5] for i in range(num)])
    hidden, head = pair.hidden(batch)[:num], made.head_weight(plain.head_weight()).detach()
    base = Base(head, lambda ids: plain.embed_tokens(ids))
    wanted = torch.cat([made.outputs_of(rows[:, i + 1].contiguous(), IGNORE) for i in range(3)])
    logits = pair.drafted(batch)[:, :num].flatten(0, 1) @ head.T
    want = F.cross_entropy(logits, wanted.long(), ignore_index=IGNORE)
    assert draft_loss(made, base, hidden, rows).item() == pytest.approx(want.item(), rel=1e-5)
    step = DraftStep(made, decoder, num)
    step.inputs.hidden[:] = hidden
    step.inputs.tokens[:] = rows[:, 0]
    served = step.run(num)[0].T
    rows[::2, 1:] = served[::2]
    rows[::4, 2] = 0
    right = (rows[:, 1:] == served).int().cumprod(1).sum(1)
    assert right.max() == 3 and right.min() == 0
    assert num_accepted(made, base, hidden, rows).tolist() == right.tolist()


def new_learner(decoder, seed=1, **changes):
    made = new_speculator(decoder, "mlp", seed=seed)
    return made, Learner(made, decoder, 1024)


def serve(engine, times):
    """Requests that repeat a text: something to learn."""
    jobs = {str(i): {"temperature": 0, "max_tokens": 60} for i in range(8)}
    for _ in range(times):
        run(engine, jobs, prefix=(1, 2, 3, 4), length=2)


def test_a_better_copy_is_swapped_in_and_output_stays(decoder, monkeypatch):
    monkeypatch.setattr(learner_module, "ROUND_STEPS", 60)
    monkeypatch.setattr(learner_module, "LR", 5e-3)
    made, learner = new_learner(decoder)
    drafter = LearnedDrafter(made, decoder, max_num_seqs=16, learner=learner)
    engine = new_engine(decoder, (drafter,), enable_prefix_cache=False)
    always_draft(engine, monkeypatch)
    want = run(new_engine(decoder), JOBS)
    assert run(engine, JOBS) == want
    serve(engine, 4)
    assert learner.is_ready()
    seen = []
    engine.on_step.append(seen.append)
    serve(engine, 1)
    before = accepted(seen)
    assert learner.round(lambda: True)
    assert learner.stats.num_swaps == 1 and not learner.is_ready()
    assert learner.stats.learned_accepted > learner.stats.served_accepted
    serve(engine, 1)
    assert accepted(seen[-1000:]) > before
    assert run(engine, JOBS) == want


def accepted(steps):
    drafts = [d for step in steps for d in step.drafts]
    return sum(d.num_accepted for d in drafts) / len(drafts)


def test_a_copy_that_is_no_better_is_thrown_away(decoder, monkeypatch):
    monkeypatch.setattr(learner_module, "LR", 10.0)  # ruins it
    made, learner = new_learner(decoder)
    drafter = LearnedDrafter(made, decoder, max_num_seqs=16, learner=learner)
    engine = new_engine(decoder, (drafter,))
    always_draft(engine, monkeypatch)
    serve(engine, 4)
    served = learner._served
    assert not learner.round(lambda: True)
    assert learner.stats.num_rollbacks == 1 and learner.stats.num_swaps == 0
    assert learner._served is served
    learner.take_update(lambda new: pytest.fail("nothing to load"))


def test_a_round_is_given_up_when_the_engine_stops(decoder, monkeypatch):
    made, learner = new_learner(decoder)
    drafter = LearnedDrafter(made, decoder, max_num_seqs=16, learner=learner)
    engine = new_engine(decoder, (drafter,))
    always_draft(engine, monkeypatch)
    serve(engine, 4)
    calls = iter([True, True, False])
    assert not learner.round(lambda: next(calls))
    assert learner.stats.num_rounds == 0


def test_the_thread_works_only_while_the_engine_is_idle(decoder, monkeypatch):
    monkeypatch.setattr(learner_module, "ROUND_STEPS", 3)
    made, learner = new_learner(decoder)
    drafter = LearnedDrafter(made, decoder, max_num_seqs=16, learner=learner)
    engine = new_engine(decoder, (drafter,))
    always_draft(engine, monkeypatch)
    serve(engine, 4)
    learner.note_step(None)
    monkeypatch.setattr(learner, "_last_step", time.monotonic() + 60)  # busy for a minute
    start_learning(engine, [drafter])
    time.sleep(0.5)
    assert learner.stats.num_rows == 1024 and learner.stats.num_rounds == 0
    learner._last_step = 0.0
    deadline = time.monotonic() + 20
    while learner.stats.num_rounds == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert learner.stats.num_rounds == 1
    assert engine.learner is learner
    engine.close()
    assert not learner._thread.is_alive()


def test_nothing_is_kept_unless_asked_for(decoder, monkeypatch):
    drafter = LearnedDrafter(new_speculator(decoder), decoder, max_num_seqs=16)
    engine = new_engine(decoder, (drafter,))
    start_learning(engine, [drafter])
    assert engine.learner is None and drafter.learner is None
