"""Speculation with every pair of other features: output as without it, to the bit.

Features of a request (in one request together) and of the engine, on tiny real decoders. Drafts are
scripted ones, right and spoilt in turn, and those of a learned head beside the suffix tree.
"""

from __future__ import annotations

import itertools
import random
from concurrent.futures import Future

import pytest
import torch
from tests.drafts import Scripted, always_draft
from tests.parity.test_learned import new_speculator
from tests.parity.test_speculation import VOCAB, folder  # noqa: F401 - a fixture
from tests.parity.test_swiftkv import VOCAB as SWIFT_VOCAB
from tests.parity.test_swiftkv import new_decoder as new_swiftkv

from sterna.engine.config import EngineConfig
from sterna.engine.drafters.learned import LearnedDrafter
from sterna.engine.drafters.suffix import SuffixDrafter
from sterna.engine.engine import Engine
from sterna.engine.memory import EngineShape
from sterna.engine.request import EngineRequest, FinishReason, SamplingParams, StructuredSpec
from sterna.kernels.load import load_kernels
from sterna.quant.load import load_quantized

LENGTH = 60
# Of a request: fields of SamplingParams.
REQUEST = {
    "structured output": {"structured": StructuredSpec("regex", "x")},
    "penalties": {"frequency_penalty": 0.5, "presence_penalty": 0.3, "repetition_penalty": 1.3},
    "logprobs": {"logprobs": 3},
    "stop strings": {"stop": tuple(chr(32 + t) for t in range(0, 160, 10))},
    "n > 1": {"n": 3, "temperature": 1.0, "seed": 5},
    "sampling": {"temperature": 0.8, "top_p": 0.9, "seed": 6},
}
# Of the engine: settings, and words that `new_engine` and `decoder_of` know.
ENGINE = {
    "prefix cache": {"passes": 2},
    "preemption": {"num_blocks": 22},
    "end of the context": {"max_model_len": LENGTH + 27},
    "chunked prompts": {"token_budget": 7},
    "FP6": {"weights": "fp6"},
    "SwiftKV": {"swiftkv": True},
    "int8 KV": {"kv_cache_dtype": "int8"},
}
FEATURES = {**REQUEST, **ENGINE}


class Letters:
    """Token i is the character chr(32 + i)."""

    eos_token_ids = ()

    def encode(self, text, add_special_tokens=True):
        return [ord(char) - 32 for char in text]

    def incremental(self, skip_special_tokens=True, *, keep_leading_space=False):
        return self

    def push(self, ids):
        return "".join(chr(32 + i) for i in ids)

    def flush(self):
        return ""


class Some:
    """A grammar: 19 tokens, each in 20 to 83."""

    error = None

    def __init__(self, left=19):
        self.left = left

    def fill_bitmask(self, out):
        out[:] = 0
        for token in range(20, 84):
            out[token // 32] |= (1 << token % 32) - (1 << 32) * (token % 32 == 31)

    def accept(self, token_id):
        is_right = 20 <= token_id < 84 and self.left > 0
        self.left -= is_right
        return is_right

    def validate_prefix(self, ids):
        rights = [20 <= token_id < 84 for token_id in ids[: self.left]]
        return rights.index(False) if False in rights else len(rights)

    @property
    def is_finished(self):
        return self.left == 0

    def copy(self):
        return Some(self.left)


class Compiler:
    num_words = 5

    def submit(self, spec):
        future = Future()
        future.set_result(self)
        return future

    def new_state(self):
        return Some()


@pytest.fixture(scope="module")
def decoder_of(folder):  # noqa: F811
    """The decoder of a feature pair, made once."""
    if load_kernels().level != "cpu":
        pytest.skip("equal bits are promised by the C++ kernels")
    made = {}

    def get(weights="auto", swiftkv=False):
        key = weights, swiftkv
        if key not in made and swiftkv:
            made[key] = new_swiftkv(
                "llama", 2, torch.bfloat16, None if weights == "auto" else weights
            )
        elif key not in made:
            made[key] = load_quantized(folder, "bfloat16", weights=weights).decoder
            made[key].prepare_inference()
        return made[key]

    return get


def new_engine(decoder, drafters, num_blocks=400, max_model_len=300, **settings):
    config = EngineConfig(**{"token_budget": 64, "max_num_seqs": 16, **settings})
    shape = EngineShape(VOCAB, max_model_len, num_blocks)
    return Engine(decoder, Letters(), config, shape, Compiler(), drafters)


def run(engine, params, passes):
    """Everything that clients see of each pass."""
    found = []
    for _ in range(passes):
        seen = {}
        for name in ("a", "b", "c"):
            rng = random.Random(name)
            prompt = tuple(rng.randrange(20, 84) for _ in range(LENGTH))
            fields = SamplingParams(**params)
            engine.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=fields))
        while engine.has_work:
            for output in engine.step():
                for delta in output.deltas:
                    assert delta.finish_reason is not FinishReason.ERROR, delta.error
                    mine = seen.setdefault((output.request_id, delta.index), ([], [], [], []))
                    mine[0].extend(delta.token_ids)
                    mine[1].append(delta.text)
                    mine[2].extend(delta.logprobs or ())
                    mine[3].append((delta.finish_reason, delta.stop_reason))
            engine.check_integrity()
        found.append({
            key: (ids, "".join(text), logprobs, [r for r in reasons if r[0]])
            for key, (ids, text, logprobs, reasons) in seen.items()
        })  # fmt: skip
    return found


def learned_and_suffix(decoder):
    head = new_speculator(decoder, "lstm")
    return (LearnedDrafter(head, decoder, max_num_seqs=16), SuffixDrafter())


@pytest.mark.parametrize("pair", itertools.combinations(FEATURES, 2), ids=" and ".join)
def test_each_pair(decoder_of, pair, monkeypatch):
    params = {"temperature": 0, "max_tokens": None if "end of the context" in pair else 40}
    settings = {}
    for name in pair:
        (params if name in REQUEST else settings).update(FEATURES[name])
    passes = settings.pop("passes", 1)
    decoder = decoder_of(settings.pop("weights", "auto"), settings.pop("swiftkv", False))
    want = run(new_engine(decoder, (), **settings), params, passes)
    assert all(found == want[0] for found in want)
    known = {key: value[0] for key, value in want[0].items()}
    for drafters in ((Scripted(known, "mixed", VOCAB),), learned_and_suffix(decoder)):
        engine = new_engine(decoder, drafters, **settings)
        always_draft(engine, monkeypatch)
        steps = []
        engine.on_step.append(steps.append)
        assert run(engine, params, passes) == want
        assert sum(step.num_draft_tokens for step in steps) > 0
    check_that_it_was_tested(pair, want[0])


def check_that_it_was_tested(pair, found):
    """The features did something."""
    ids = [value[0] for value in found.values()]
    reasons = {reason for *_, ends in found.values() for reason, _ in ends}
    if "n > 1" in pair:
        assert len(found) == 9
    if "structured output" in pair:
        assert all(20 <= token < 84 for one in ids for token in one)
    elif "stop strings" in pair:
        assert FinishReason.STOP in reasons
    elif "end of the context" in pair:
        assert all(len(one) == 27 for one in ids)
    if "logprobs" in pair:
        assert all(len(entries) == len(one) for one, _, entries, _ in found.values())


def test_the_vocabularies_are_alike():
    assert SWIFT_VOCAB == VOCAB
