"""The drafter with a model of its own: its drafts are what greedy decoding of that model gives.

The draft model is the fake one of conftest.py, whose output depends on every token and position
that it can see: stale keys of rejected drafts, or a block too few, change the draft.
"""

from __future__ import annotations

import random

import pytest

from sterna.core.errors import ConfigError
from sterna.engine.drafters.model import BLOCK_SIZE, MAX_CATCH_UP, ModelDrafter, check_vocabulary
from sterna.engine.request import EngineRequest, SamplingParams


@pytest.fixture
def new_drafter(fake_decoder):
    def make(**settings):
        settings = {"max_num_seqs": 4, "num_blocks": 100, "min_prob": 0.0, **settings}
        return ModelDrafter(fake_decoder(), **settings)

    return make


@pytest.fixture
def new_seq(harness):
    """Sequences as an engine makes them, of one that is never stepped."""
    factory = harness().engine._factory

    def make(prompt, **params):
        params = SamplingParams(max_tokens=50, **params)
        request = EngineRequest(request_id="x", prompt_token_ids=tuple(prompt), params=params)
        return factory.new_state(request).sequences[0]

    return make


def test_drafts_are_the_models_greedy_text_whatever_was_rejected(new_drafter, new_seq, greedy):
    drafter, rng = new_drafter(), random.Random(0)
    seqs = [new_seq(range(n)) for n in (3, 20, 40)]
    for _ in range(12):
        limits = [rng.randrange(6) for _ in seqs]
        drafts = drafter.propose(seqs, limits)
        for seq, limit, draft in zip(seqs, limits, drafts, strict=True):
            text = [*seq.state.prompt.tolist(), *seq.output]
            assert (draft.tokens if draft else []) == greedy(text, limit, False)
            kept = draft.tokens[: rng.randrange(limit + 1)] if draft else []
            seq.output.extend([*kept, rng.randrange(90)])
        drafter.check_integrity()
    for seq in seqs:
        drafter.finish(seq)
        drafter.finish(seq)
    drafter.check_integrity()


def test_a_draft_ends_where_its_path_grows_unlikely(new_drafter, new_seq):
    seq, bold, shy = new_seq([1, 2, 3]), new_drafter(), new_drafter(min_prob=0.2)
    (long,), (short,) = bold.propose([seq], [20]), shy.propose([seq], [20])
    count = len(short.tokens) if short else 0
    path = 1.0
    for prob in long.probs[: count + 1]:
        path *= prob
    assert path < 0.2
    assert count < len(long.tokens) == 20


def test_a_long_prompt_is_computed_over_several_proposals(new_drafter, new_seq, greedy):
    prompt = [i % 90 for i in range(MAX_CATCH_UP + 100)]
    seq, other, drafter = new_seq(prompt), new_seq([5, 6]), new_drafter()
    first, second = drafter.propose([seq, other], [2, 2])
    assert first is None
    assert second.tokens == greedy([5, 6], 2, False)
    assert drafter.propose([seq], [2])[0].tokens == greedy(prompt, 2, False)


def test_without_blocks_or_positions_there_is_no_draft(new_drafter, new_seq):
    drafter = new_drafter(num_blocks=4)  # 3 that can be held
    first, second = new_seq([1] * 2 * BLOCK_SIZE), new_seq([2] * 2 * BLOCK_SIZE)
    drafts = drafter.propose([first, second], [2, 2])
    assert drafts[0] is not None
    assert drafts[1] is None
    drafter.finish(first)
    assert drafter.propose([second], [2])[0] is not None
    longest = new_seq([3] * 500)  # the model has 512 positions
    roomy = new_drafter()
    roomy.propose([longest], [32])
    (draft,) = roomy.propose([longest], [32])
    assert len(draft.tokens) == 13  # the last one's own position is the 513th: not computed
    roomy.check_integrity()


class Vocabulary:
    """What check_vocabulary reads of a Tokenizer."""

    def __init__(self, *tokens):
        self.tokens = tokens
        self.vocab_size = len(tokens)
        self.fingerprint = str(id(self))

    def token_bytes(self, i):
        return self.tokens[i]


def test_other_vocabularies_are_refused_with_what_differs():
    check_vocabulary(Vocabulary(b"a", b"b"), Vocabulary(b"a", b"b"))
    with pytest.raises(ConfigError, match="has 1 tokens, the model's 2"):
        check_vocabulary(Vocabulary(b"a"), Vocabulary(b"a", b"b"))
    with pytest.raises(ConfigError, match="token 1 is b'c'"):
        check_vocabulary(Vocabulary(b"a", b"c"), Vocabulary(b"a", b"b"))
