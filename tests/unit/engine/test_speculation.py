"""Speculation in the engine: whatever is guessed, the output is that of plain decoding.

Each case runs plain first; the scripted drafters then know the output and guess it rightly, wrongly
or both. Deltas are joined before they are compared: a step may bring several tokens.
"""

from __future__ import annotations

import itertools
from concurrent.futures import Future

import pytest
from tests.drafts import KINDS, Scripted, always_draft

from sterna.engine.request import FinishReason, StructuredSpec

VOCAB = 97
TEXT = [7, 8, 9, 10, 7, 8, 9, 11, 7, 8] * 5

REQUESTS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3},
    "narrow": {"temperature": 0.8, "seed": 4, "top_p": 0.9, "top_k": 20},
    "penalties": {
        "temperature": 0.7,
        "seed": 5,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.7,
        "repetition_penalty": 1.2,
    },
    "bias": {"logit_bias": {20: 5.0, 21: 5.0, 22: -50.0}},
    "allowed": {"allowed_token_ids": (20, 21, 22, 23, 96)},
    "bad words": {"bad_words": ("A", "BC", "Q"), "temperature": 1.0, "seed": 6},
    "min tokens": {"min_tokens": 20, "max_tokens": 30, "ignore_eos": False, "temperature": 2.0},
    "logprobs": {"logprobs": 3, "temperature": 1.0, "seed": 7},
    "samples": {"n": 3, "temperature": 1.0, "seed": 8},
    "eos": {"ignore_eos": False, "logit_bias": {96: 2.0}, "temperature": 1.0, "seed": 9},
    "prompt logprobs": {"prompt_logprobs": 1, "logprobs": 0},
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
}
SETTINGS = {
    "plain": {},
    "chunks of 7": {"token_budget": 7},
    "one token steps": {"token_budget": 1},
    "preempted": {"num_blocks": 16, "max_model_len": 200},
    "whole prompts": {"policy": "whole-prompt"},
    "no prefix cache": {"enable_prefix_cache": False},
    "few rows": {"max_draft_rows": 3},
}


def add_all(h, names, prefix=TEXT):
    for i, name in enumerate(names):
        params = {"max_tokens": 40, "ignore_eos": True, **REQUESTS[name]}
        h.add(name, [*prefix, i, 30 + i], **params)


def results(h):
    """All that a client sees, by request and sample."""
    found = {}
    for name, outputs in h.outputs.items():
        prompt_logprobs = [o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None]
        deltas = [d for o in outputs for d in o.deltas]
        for index in sorted({d.index for d in deltas}):
            mine = [d for d in deltas if d.index == index]
            found[name, index] = (
                [t for d in mine for t in d.token_ids],
                "".join(d.text for d in mine),
                [entry for d in mine for entry in d.logprobs or ()],
                [(d.finish_reason, d.stop_reason) for d in mine if d.finish_reason],
                prompt_logprobs,
            )
    return found


def known(found):
    return {key: value[0] for key, value in found.items()}


@pytest.fixture
def compare(harness, monkeypatch):
    """Run requests plain, then speculating; returns (expected, seen, drafter, harness)."""

    def run(add, kind, **settings):
        plain = harness(**settings)
        add(plain)
        want = results(plain.run())
        drafter = Scripted(known(want), kind, VOCAB)
        h = harness(drafters=(drafter,), speculation="scripted", **settings)
        always_draft(h.engine, monkeypatch)
        seen = []
        h.engine.on_step.append(seen.append)
        add(h)
        assert results(h.run()) == want
        assert not drafter.seen, "a sequence was not finished"
        assert h.engine.num_free_blocks == h.engine.pool.num_usable
        return h, plain, seen

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_output_is_that_of_plain_decoding(compare, kind, setting):
    _, _, seen = compare(lambda h: add_all(h, REQUESTS), kind, **setting)
    num_drafted = sum(s.num_draft_tokens for s in seen)
    assert (num_drafted > 0) == (setting.get("token_budget") != 1)
    if "num_blocks" in setting:
        assert sum(s.num_preempted for s in seen) > 0
    assert all(
        s.num_decode_tokens + s.num_draft_tokens + s.num_prompt_tokens <= s.token_budget
        for s in seen
        if setting.get("policy") != "whole-prompt"
    )


@pytest.mark.parametrize("pair", itertools.combinations(REQUESTS, 2), ids="+".join)
def test_each_pair_of_features(compare, pair):
    compare(lambda h: add_all(h, pair), "mixed")


def test_right_drafts_save_steps(compare):
    h, plain, seen = compare(lambda h: add_all(h, ["greedy"]), "right")
    assert len(h.decoder.steps) < len(plain.decoder.steps) / 8
    (first, *_) = [result for s in seen for result in s.drafts]
    assert first.source == "scripted"
    assert first.num_tokens == first.num_accepted == 12


def test_wrong_drafts_gain_nothing_and_cost_no_token(compare):
    _, _, seen = compare(lambda h: add_all(h, ["greedy"]), "wrong")
    assert {result.num_accepted for s in seen for result in s.drafts} == {0}
    assert sum(s.num_decode_tokens for s in seen) == 39


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_hit_after_drafts_finds_the_same_blocks(harness, monkeypatch, greedy, kind):
    """Only committed blocks are published: the next turn is found cached, and is right."""
    plain = harness()
    plain.add("a", range(30), max_tokens=40, ignore_eos=True)
    plain.run()
    drafter = Scripted({("a", 0): plain.tokens("a")}, kind, VOCAB)
    h = harness(drafters=(drafter,))
    always_draft(h.engine, monkeypatch)
    h.add("a", range(30), max_tokens=40, ignore_eos=True)
    h.run()
    turn = [*range(30), *h.tokens("a"), 5]
    h.add("b", turn, max_tokens=3)
    h.run()
    assert h.outputs["b"][0].num_cached_tokens == 64
    assert h.tokens("b") == greedy(turn, 3)


def test_a_stop_string_inside_an_accepted_draft(compare):
    def add(h):
        h.add("x", TEXT, max_tokens=40, ignore_eos=True)

    h, _, _ = compare(add, "right")
    text = h.text("x")
    for at, size in ((3, 3), (9, 2), (11, 1)):
        for include in (False, True):
            stop = text[at : at + size]

            def add_stopped(h, stop=stop, include=include):
                h.add(
                    "x", TEXT, max_tokens=40, ignore_eos=True, stop=(stop,), logprobs=0,
                    include_stop_str_in_output=include,
                )  # fmt: skip

            # The plain output ends at the stop, the drafter says what would follow.
            again, _, _ = compare(add_stopped, "right")
            assert again.end("x").finish_reason is FinishReason.STOP
            assert again.end("x").stop_reason == stop


def test_the_context_limit(compare):
    for length in (95, 98, 99):
        h, _, _ = compare(
            lambda h, n=length: h.add("a", range(1, n + 1) if n < 97 else [1] * n, max_tokens=None,
                                      ignore_eos=True),
            "right", max_model_len=100,
        )  # fmt: skip
        assert len(h.tokens("a")) == 100 - length
        assert h.end("a").finish_reason is FinishReason.LENGTH


def test_the_pool_limit_without_a_spare_block(compare):
    """One request that fills the whole cache."""
    h, _, _ = compare(
        lambda h: h.add("a", [1] * 40, max_tokens=24, ignore_eos=True), "right", num_blocks=5
    )
    assert len(h.tokens("a")) == 24


def test_abort_and_opt_out(harness, monkeypatch):
    plain = harness()
    plain.add("a", TEXT, max_tokens=60, ignore_eos=True)
    plain.run()
    drafter = Scripted({("a", 0): plain.tokens("a"), ("b", 0): plain.tokens("a")}, "mixed", VOCAB)
    h = harness(drafters=(drafter,))
    always_draft(h.engine, monkeypatch)
    h.add("a", TEXT, max_tokens=60, ignore_eos=True)
    h.step(), h.step()
    assert h.engine.abort("a").is_finished
    assert h.engine.num_free_blocks == h.engine.pool.num_usable
    assert not drafter.seen
    seen = []
    h.engine.on_step.append(seen.append)
    h.add("b", TEXT, max_tokens=60, ignore_eos=True, speculation=False)
    h.run()
    assert h.tokens("b") == plain.tokens("a")
    assert not sum(s.num_draft_tokens for s in seen)


def test_opt_in(harness, monkeypatch, greedy):
    drafter = Scripted({(name, 0): greedy(TEXT, 20) for name in "ab"}, "right", VOCAB)
    h = harness(drafters=(drafter,), speculation_opt_in=True)
    always_draft(h.engine, monkeypatch)
    for name, asked in (("a", None), ("b", True)):
        h.add(name, TEXT, max_tokens=20, speculation=asked)
        num = len(h.decoder.steps)
        h.run()
        assert h.tokens(name) == greedy(TEXT, 20)
        assert (len(h.decoder.steps) - num < 10) == (asked is True)


@pytest.mark.parametrize("method", ["propose", "finish"])
def test_a_failing_drafter_loses_only_its_drafts(harness, monkeypatch, greedy, method):
    bad = Scripted({}, "right", VOCAB)
    good = Scripted({("a", 0): greedy(TEXT, 40, False)}, "right", VOCAB)
    bad.name = "bad"
    calls = []

    def fail(*args):
        calls.append(args)
        raise RuntimeError("drafter bug")

    setattr(bad, method, fail)
    h = harness(drafters=(bad, good), token_budget=200)
    always_draft(h.engine, monkeypatch)
    for i in range(6):
        good.known[str(i), 0] = greedy(TEXT, 40, False)
        h.add(str(i), TEXT, max_tokens=40, ignore_eos=True)
    h.run()
    assert all(h.tokens(str(i)) == greedy(TEXT, 40, False) for i in range(6))
    assert calls
    if method != "finish":
        assert len(h.decoder.steps) < 20  # the good one's drafts were used
    if len(calls) >= 8:
        assert h.engine.speculator.drafters == [good]


@pytest.mark.parametrize("fault", ["poison", "explode"])
def test_a_draft_that_breaks_the_model_fails_nobody(harness, monkeypatch, fake_decoder, fault):
    """Token 95 makes NaN or raises, and is never generated: only a draft can bring it in."""
    plain = harness()
    for name in "ab":
        plain.add(name, [*TEXT, ord(name) % 90], max_tokens=30, ignore_eos=True)
    plain.run()
    known = {(name, 0): plain.tokens(name) for name in "ab"}
    known["a", 0] = [*known["a", 0][:5], 95, *known["a", 0][6:]]
    h = harness(fake_decoder(**{fault: {95}}), drafters=(Scripted(known, "right", VOCAB),))
    always_draft(h.engine, monkeypatch)
    for name in "ab":
        h.add(name, [*TEXT, ord(name) % 90], max_tokens=30, ignore_eos=True)
    h.run()
    assert h.tokens("a") == plain.tokens("a")
    assert h.tokens("b") == plain.tokens("b")


def test_nan_logits_in_an_accepted_place_end_the_request(harness, monkeypatch, fake_decoder):
    """Tokens before the fault are delivered, as they are without drafts."""
    lone = harness()
    lone.add("a", TEXT, max_tokens=30, ignore_eos=True)
    output = lone.run().tokens("a")
    poison = next(t for i, t in enumerate(output) if i > 4 and t not in TEXT + output[:i])
    want, got = [], []
    for found, drafters in ((want, ()), (got, (Scripted({("a", 0): output}, "right", VOCAB),))):
        h = harness(fake_decoder(poison={poison}), drafters=drafters)
        if drafters:
            always_draft(h.engine, monkeypatch)
        h.add("a", TEXT, max_tokens=30, ignore_eos=True)
        h.run()
        found.append((h.tokens("a"), h.end("a").finish_reason, str(h.end("a").error)))
    assert want == got
    assert want[0][0][-1] == poison


class Digits:
    """Allows '0' to '9' (tokens 16-25), exactly `length` of them."""

    error = None

    def __init__(self, length):
        self.left = length

    def fill_bitmask(self, out):
        assert self.left > 0, "a finished grammar is asked"
        out[:] = 0
        out[0] = 0x03FF0000

    def accept(self, token_id):
        if not (16 <= token_id <= 25 and self.left > 0):
            self.error = "refused"
            return False
        self.left -= 1
        return True

    def validate_prefix(self, ids):
        allowed = [16 <= token_id <= 25 for token_id in ids[: self.left]]
        return allowed.index(False) if False in allowed else len(allowed)

    @property
    def is_finished(self):
        return self.left == 0

    def copy(self):
        return Digits(self.left)


class Compiler:
    num_words = 4

    def submit(self, spec):
        future = Future()
        future.set_result(self)
        return future

    def new_state(self):
        return Digits(17)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 2, "n": 2, "logprobs": 1}])
def test_a_grammar_is_followed_through_drafts(compare, kind, params):
    def add(h):
        spec = StructuredSpec("regex", "x")
        h.add("g", TEXT, max_tokens=40, structured=spec, **params)
        h.add("cut", TEXT, max_tokens=9, structured=spec, **params)

    h, _, _ = compare(add, kind, grammars=Compiler())
    assert len(h.tokens("g")) == 17
    assert set(h.tokens("g")) <= set(range(16, 26))
    assert len(h.tokens("cut")) == 9
