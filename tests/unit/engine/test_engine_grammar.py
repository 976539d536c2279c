"""Grammars in the engine: compiled in the background, followed token by token, forked, refused."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest

from sterna.core.errors import GrammarError, RequestError
from sterna.engine.request import FinishReason, StructuredSpec

SPEC = StructuredSpec("regex", "x")
EOS = 96  # of the fake tokenizer


class Digits:
    """Allows the tokens 16-25 ('0'-'9'), exactly `length` of them."""

    def __init__(self, length, refuse_at=None, stick_at=None):
        self.left = length
        self.refuse_at = refuse_at
        self.stick_at = stick_at
        self.error = None

    def fill_bitmask(self, out):
        out[:] = 0
        if self.left == self.stick_at:
            self.error = "limit"
            out[EOS // 32] = 1 << EOS % 32  # as llguidance: nothing but the end
            return
        out[0] = np.uint32(0x03FF0000).astype(np.int32)

    def accept(self, token_id):
        assert 16 <= token_id <= 25
        self.left -= 1
        if self.left == self.refuse_at:
            self.error = "limit"
            return False
        return True

    @property
    def is_finished(self):
        return self.left == 0

    def copy(self):
        return Digits(self.left, self.refuse_at, self.stick_at)


class Compiler:
    num_words = 4

    def __init__(self, **kwargs):
        self.kwargs = kwargs
        self.futures = []

    def submit(self, spec):
        self.futures.append(Future())
        return self.futures[-1]

    def finish(self):
        for future in self.futures:
            if not future.done():
                future.set_result(self)

    def new_state(self):
        return Digits(5, **self.kwargs)


def test_a_compiling_grammar_holds_up_nobody(harness, greedy):
    compiler = Compiler()
    h = harness(grammars=compiler)
    h.add("g", [1, 2], structured=SPEC)
    h.add("plain", [3], max_tokens=4)
    for _ in range(4):
        h.step()
    assert h.tokens("plain") == greedy([3], 4)
    assert h.step() == []
    assert h.engine.has_work
    compiler.finish()
    h.run()
    assert len(h.tokens("g")) == 5
    assert h.text("g").isdigit()
    assert h.end("g").finish_reason is FinishReason.STOP


def test_samples_follow_their_own_copy(harness):
    compiler = Compiler()
    h = harness(grammars=compiler, num_blocks=10, max_model_len=100)
    h.add("g", range(30), structured=SPEC, n=4, temperature=1.0, seed=1, max_tokens=50)
    h.add("other", range(50), max_tokens=45, ignore_eos=True)
    compiler.finish()
    h.run()
    texts = {h.text("g", index) for index in range(4)}
    assert len(texts) == 4
    assert all(len(text) == 5 and text.isdigit() for text in texts)


def test_a_grammar_that_does_not_compile_ends_its_request(harness):
    compiler = Compiler()
    h = harness(grammars=compiler)
    h.add("g", [1, 2], structured=SPEC, n=2)
    compiler.futures[0].set_exception(GrammarError("no"))
    h.step()
    for index in range(2):
        assert isinstance(h.end("g", index).error, GrammarError)
    assert not h.engine.has_work


@pytest.mark.parametrize("fault", [{"refuse_at": 2}, {"stick_at": 2}, {"stick_at": 5}])
@pytest.mark.parametrize("n", [1, 3])
def test_a_grammar_that_fails_midway_ends_only_its_request(harness, greedy, fault, n):
    """A token that is refused, or a mask that cannot be computed: never a short answer."""
    compiler = Compiler(**fault)
    h = harness(grammars=compiler)
    h.add("g", [1, 2], structured=SPEC, n=n, temperature=1.0, seed=1)
    h.add("plain", [3], max_tokens=9)
    compiler.finish()
    h.run()
    for index in range(n):
        assert isinstance(h.end("g", index).error, GrammarError)
        assert "limit" in str(h.end("g", index).error)
    assert h.tokens("plain") == greedy([3], 9)


def test_abort_while_compiling(harness):
    h = harness(grammars=Compiler())
    h.add("g", [1, 2], structured=SPEC)
    assert h.engine.abort("g").is_finished
    assert not h.engine.has_work


def test_requests_with_a_grammar_need_a_compiler_and_a_sound_text(harness):
    with pytest.raises(RequestError, match="without structured output"):
        harness().add("g", [1], structured=SPEC)
    with pytest.raises(GrammarError, match="empty"):
        harness(grammars=Compiler()).add("g", [1], structured=StructuredSpec("regex"))
