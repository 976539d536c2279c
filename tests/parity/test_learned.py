"""Learned drafters: the captured loop against the torch module, the states it starts from, and
engines whose output does not change.

Random heads: right now and then on a vocabulary of 160, mostly wrong, which is what verification
must bear. Scripted drafters (test_speculation.py) are those that are right.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from tests.drafts import Scripted, always_draft
from tests.parity.conftest import packed_batch
from tests.parity.test_speculation import (  # noqa: F401 - fixtures
    JOBS,
    SETTINGS,
    VOCAB,
    check_distribution,
    decoder,
    folder,
    known,
    new_engine,
    run,
)
from tests.parity.test_swiftkv import new_decoder as new_swiftkv

from sterna.core.errors import ConfigError
from sterna.engine.drafters.base import Draft
from sterna.engine.drafters.draft_step import DraftStep, base_rows
from sterna.engine.drafters.learned import LearnedDrafter
from sterna.engine.drafters.suffix import SuffixDrafter
from sterna.kernels.load import load_kernels
from sterna.model.load import load_model
from sterna.model.speculator import Speculator, SpeculatorConfig

HIDDEN, INNER = 64, 48
SOME = tuple(range(3, VOCAB, 2))
CASES = list(itertools.product(("mlp", "lstm"), (True, False), ((), SOME)))


def new_speculator(decoder, cell="mlp", shares_base=True, draft_tokens=(), seed=1):  # noqa: F811
    family = decoder.config.family.name
    config = SpeculatorConfig(
        cell, HIDDEN, VOCAB, INNER, 3, True, shares_base, family, draft_tokens
    )
    made = Speculator(config)
    made.init_weights(seed)
    torch.manual_seed(seed)
    for name, p in made.named_parameters():
        if "norm" in name:
            p.data += 0.3 * torch.randn_like(p)
    return made.to(decoder.dtype)


def tables(decoder):  # noqa: F811
    ids = torch.arange(VOCAB, dtype=torch.int32)
    return decoder.embed_tokens(ids).float(), base_rows(decoder, ids).float()


@pytest.mark.parametrize(("cell", "shares_base", "draft_tokens"), CASES)
@pytest.mark.parametrize("replay", [True, False])
def test_every_draft_is_the_modules(decoder, cell, shares_base, draft_tokens, replay):  # noqa: F811
    """Given the tokens before, each draft is the torch module's in float32 on the same weights.

    float32: 1e-4 of the largest logit, sums in another order. bfloat16: each of the nine values
    between a hidden state and a logit of the third draft rounds by 2^-9, and gelu and norms pass
    errors on about as they are: 9 * 2^-9 doubled.
    """
    made = new_speculator(decoder, cell, shares_base, draft_tokens)
    step = DraftStep(made, decoder, 6, replay)
    assert (step._replay is not None) == replay
    torch.manual_seed(7)
    hidden = torch.randn(5, HIDDEN).to(decoder.dtype)
    step.inputs.hidden[:5] = hidden
    step.inputs.tokens[:5] = torch.tensor([3, 5, 7, 11, 150], dtype=torch.int32)
    tokens, probs = (x.clone() for x in step.run(5))
    alone, _ = step.run(1)
    assert torch.equal(alone[:, 0], tokens[:, 0])
    wide, (rows, head) = made.float(), tables(decoder)
    state, last = wide.start(hidden.float())
    given = step.inputs.tokens[:5].long()
    tol = 1e-4 if decoder.dtype == torch.float32 else 2 * 9 * 2**-9
    with torch.no_grad():
        for draft in range(3):
            state, last = wide.step(draft, state, last, given, rows)
            logits = wide.before_head(state) @ wide.head_weight(head).T
            at = wide.outputs_of(tokens[draft].long(), -1)
            assert at.min() >= 0
            chosen = logits.gather(1, at[:, None])[:, 0]
            assert (logits.max(1).values - chosen).max() <= tol * logits.abs().max()
            if decoder.dtype == torch.float32:
                assert torch.equal(wide.tokens_of(logits.argmax(1)), tokens[draft].long())
            want = logits.softmax(-1).max(1).values
            assert (probs[draft] - want).abs().max() <= tol * max(1.0, logits.abs().max())
            given = tokens[draft].long()


def test_other_weights_are_taken_in_place(decoder):  # noqa: F811
    a, b = (new_speculator(decoder, "lstm", draft_tokens=SOME, seed=i) for i in (1, 2))
    step, other = DraftStep(a, decoder, 4), DraftStep(b, decoder, 4)
    for each in (step, other):
        torch.manual_seed(3)
        each.inputs.hidden[:] = torch.randn(4, HIDDEN)
        each.inputs.tokens[:] = 9
    before = step.run(4)[0].clone()
    want = [x.clone() for x in other.run(4)]
    assert not torch.equal(before, want[0])
    step.load(b)
    assert all(torch.equal(x, y) for x, y in zip(step.run(4), want, strict=True))


def test_another_models_speculator_is_refused(decoder):  # noqa: F811
    made = new_speculator(decoder)
    made.config = dataclasses.replace(made.config, hidden_size=32)
    with pytest.raises(ConfigError, match="train one for it"):
        DraftStep(made, decoder, 4)


class Watcher(Scripted):
    """Keeps the state behind every committed token, and compares the one it drafts from."""

    num_drafts = 99
    observes = True

    def __init__(self, *args):
        super().__init__(*args)
        self.states = {}

    def read(self, hidden, rows):
        for seq, row in rows.items():
            states = self.states[seq.state.request.request_id, seq.index]
            assert torch.equal(hidden[row], states[len(seq.output) - 1])

    def observe(self, seq, hidden):
        key = seq.state.request.request_id, seq.index
        at = len(seq.output) - len(hidden)
        for i, row in enumerate(hidden):
            self.states.setdefault(key, {})[at + i] = row.clone()
        self.prompts = {**getattr(self, "prompts", {}), key: (seq.state.prompt, seq.output)}


EXACT = [name for name in SETTINGS if "cache" not in name]  # training keeps no quantised cache


@pytest.mark.parametrize("setting", EXACT)
@pytest.mark.parametrize("kind", ["right", "mixed"])
def test_the_state_is_the_one_that_each_token_was_drawn_from(
    decoder,  # noqa: F811
    setting,
    kind,
    monkeypatch,
):
    """To the bit, after cut prompts, preemption, prefix hits, forks and rejected drafts."""
    jobs = {**JOBS, "scored": {"prompt_logprobs": 1, "temperature": 0}}
    check_states(decoder, jobs, kind, SETTINGS[setting], monkeypatch)


def check_states(decoder, jobs, kind, settings, monkeypatch):  # noqa: F811
    want = run(new_engine(decoder, **settings), jobs)
    watcher = Watcher(known(want), kind, VOCAB)
    engine = new_engine(decoder, (watcher,), **settings)
    always_draft(engine, monkeypatch)
    for _ in range(2):  # the second time over the cached blocks of the first
        watcher.states.clear()
        assert run(engine, jobs) == want
        assert set(watcher.states) == set(known(want))
        for key, states in watcher.states.items():
            prompt, output = watcher.prompts[key]
            assert sorted(states) == list(range(len(output)))
            with torch.inference_mode():
                rows = decoder.hidden(packed_batch([[*prompt.tolist(), *output]]))
            for place, state in states.items():
                assert torch.equal(state, rows[len(prompt) + place - 1])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("cell", ["mlp", "lstm"])
def test_output_is_that_of_plain_decoding(decoder, settings, cell, monkeypatch):  # noqa: F811
    want = run(new_engine(decoder, **settings), JOBS)
    made = new_speculator(decoder, cell)
    learned = LearnedDrafter(made, decoder, max_num_seqs=16, replay=settings.get("capture", True))
    engine = new_engine(decoder, (learned, SuffixDrafter()), **settings)
    always_draft(engine, monkeypatch)
    seen = []
    engine.on_step.append(seen.append)
    assert run(engine, JOBS) == want
    sources = {draft.source for step in seen for draft in step.drafts}
    assert cell in sources
    assert not learned._said, "a sequence was not finished"


def test_the_distribution_of_sampled_tokens(folder, monkeypatch):  # noqa: F811
    """With the guesses of a head and of all outputs before."""
    decoder = load_model(folder, dtype="float32").decoder  # noqa: F811
    decoder.prepare_inference()
    head = LearnedDrafter(new_speculator(decoder, "lstm"), decoder, max_num_seqs=48)
    assert check_distribution(decoder, lambda _: (head, SuffixDrafter()), monkeypatch) > 50


def test_more_sequences_than_places_are_drafted_in_parts(decoder):  # noqa: F811
    learned = LearnedDrafter(new_speculator(decoder), decoder, max_num_seqs=2)

    class Seq:
        def __init__(self, token):
            self.output = [token]

    seqs = [Seq(i) for i in range(5)]
    hidden = torch.randn(10, HIDDEN, generator=torch.Generator().manual_seed(0))
    learned.read(hidden.to(decoder.dtype), {seq: 2 * i + 1 for i, seq in enumerate(seqs)})
    drafts = learned.propose([*seqs, Seq(1)], [3, 2, 0, 3, 1, 3])
    assert [d and len(d.tokens) for d in drafts] == [3, 2, None, 3, 1, None]
    one = learned.propose([seqs[3]], [3])
    assert isinstance(one[0], Draft)
    assert one[0].tokens == drafts[3].tokens


@pytest.mark.parametrize("name", ["llama-tied-bias", "gemma3", "smollm3"])
def test_on_a_swiftkv_model(name, monkeypatch):
    """Its prompt rows stop after k layers; those that tokens are drawn from go all the way."""
    if load_kernels().level != "cpu":
        pytest.skip("equal bits are promised by the C++ kernels")
    student = new_swiftkv(name, 2, torch.bfloat16)
    check_states(student, JOBS, "mixed", {"token_budget": 24}, monkeypatch)
    want = run(new_engine(student), JOBS)
    made = new_speculator(student, "lstm", draft_tokens=SOME)
    learned = LearnedDrafter(made, student, max_num_seqs=16)
    engine = new_engine(student, (learned,))
    always_draft(engine, monkeypatch)
    assert run(engine, JOBS) == want
