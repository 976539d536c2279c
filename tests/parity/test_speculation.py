"""Speculation on a real decoder: bit for bit the output of plain decoding, logprobs included.

The tiny Llama of test_engine.py, in float32 and bfloat16, with FP6 weights, with quantised caches,
captured and interpreted. The drafters are scripted (tests/drafts.py). The chi-square test at the
end does not trust that argument: it counts sampled tokens over many seeds against the exact
distribution.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import transformers as tf
from tests.drafts import KINDS, Scripted, always_draft
from tests.parity.conftest import packed_batch

from sterna.engine.config import EngineConfig
from sterna.engine.drafters.base import Draft
from sterna.engine.engine import Engine
from sterna.engine.memory import EngineShape
from sterna.engine.request import EngineRequest, FinishReason, SamplingParams
from sterna.kernels.load import load_kernels
from sterna.model.load import load_model
from sterna.quant.load import load_quantized

VOCAB = 160

JOBS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0, "seed": 1},
    "narrow": {"temperature": 0.7, "seed": 2, "top_p": 0.8, "top_k": 40, "min_p": 0.01},
    "penalties": {"temperature": 0, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    "biased": {"temperature": 1.0, "seed": 3, "logit_bias": {5: 2.0, 6: -3.0}},
    "samples": {"n": 3, "temperature": 1.0, "seed": 4},
}
SETTINGS = {
    "together": {},
    "chunks of 7": {"token_budget": 7},
    "preempted": {"num_blocks": 20},
    "interpreted": {"capture": False},
    "int8 cache": {"kv_cache_dtype": "int8"},
    "fp8 cache": {"kv_cache_dtype": "fp8"},
}


class NoText:
    eos_token_ids = ()

    def encode(self, text, add_special_tokens=True):
        return [ord(c) % VOCAB for c in text]

    def incremental(self, skip_special_tokens=True, *, keep_leading_space=False):
        return self

    def push(self, ids):
        return ""

    def flush(self):
        return ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    path = tmp_path_factory.mktemp("llama")
    tf.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["float32", "bfloat16", "fp6"])
def decoder(request, folder):
    if load_kernels().level != "cpu":
        pytest.skip("equal bits are promised by the C++ kernels")
    if request.param == "fp6":
        decoder = load_quantized(folder, weights="fp6").decoder
    else:
        decoder = load_model(folder, dtype=request.param).decoder
    decoder.prepare_inference()
    return decoder


def run(engine, jobs, prefix=(), length=60):
    for name, params in jobs.items():
        rng = random.Random(name)
        prompt = (*prefix, *(rng.randrange(VOCAB) for _ in range(length)))
        params = SamplingParams(**{"max_tokens": 40, "logprobs": 2, **params})
        engine.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params))
    found = {}
    while engine.has_work:
        for output in engine.step():
            for delta in output.deltas:
                assert delta.finish_reason is not FinishReason.ERROR, delta.error
                key = output.request_id, delta.index
                found.setdefault(key, []).extend(delta.logprobs or ())
        engine.check_integrity()
    return found


def new_engine(decoder, drafters=(), num_blocks=400, **settings):
    settings = {"token_budget": 64, "max_num_seqs": 16, **settings}
    shape = EngineShape(VOCAB, 300, num_blocks)
    return Engine(decoder, NoText(), EngineConfig(**settings), shape, drafters=drafters)


def known(found):
    return {key: [entry.token_id for entry in entries] for key, entries in found.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_speculative_is_plain(decoder, settings, kind, monkeypatch):
    want = run(new_engine(decoder, **settings), JOBS)
    engine = new_engine(decoder, (Scripted(known(want), kind, VOCAB),), **settings)
    assert (engine.runner.captured is not None) == settings.get("capture", True)
    always_draft(engine, monkeypatch)
    seen = []
    engine.on_step.append(seen.append)
    for _ in range(2):  # the second time over the cached blocks of the first
        assert run(engine, JOBS) == want
    assert sum(s.num_draft_tokens for s in seen) > 100
    if kind != "right":  # those end before memory is short
        assert (sum(s.num_preempted for s in seen) > 0) == ("num_blocks" in settings)


class Guess:
    """Always the same two tokens."""

    name = "guess"

    def __init__(self, tokens):
        self.tokens = tokens

    def start(self, seq):
        pass

    finish = start

    def extend(self, seq, tokens):
        pass

    def propose(self, seqs, limits):
        return [Draft(self.tokens[:n], [0.9, 0.5][:n], "guess") if n else None for n in limits]


def test_the_distribution_of_sampled_tokens(folder, monkeypatch):
    """While the likeliest value of the second token is guessed."""
    decoder = load_model(folder, dtype="float32").decoder
    decoder.prepare_inference()
    num_accepted = check_distribution(
        decoder, lambda expected: (Guess([int(expected.argmax()), 7]),), monkeypatch
    )
    assert num_accepted > 50


def check_distribution(decoder, drafters_of, monkeypatch):
    """Chi-square of the second token over 4,000 seeds; how many drafts were accepted.

    `drafters_of` gets its expected counts. Bins expect 8 draws or more. The bound is the mean plus
    5 standard deviations.
    """
    prompt, num_seeds, temperature = (3, 1, 4, 1, 5), 4000, 0.7
    first = next_probs(decoder, [prompt], temperature)[0]
    second = next_probs(decoder, [(*prompt, t) for t in range(VOCAB)], temperature)
    expected = num_seeds * first @ second
    engine = new_engine(decoder, drafters_of(expected), num_blocks=2000, max_num_seqs=48)
    always_draft(engine, monkeypatch)
    results = []
    engine.on_step.append(lambda step: results.extend(step.drafts))
    jobs = {
        str(seed): {"seed": seed, "max_tokens": 3, "temperature": temperature}
        for seed in range(num_seeds)
    }
    found = known(run(engine, jobs, prompt, length=0))
    counts = np.bincount([tokens[1] for tokens in found.values()], minlength=VOCAB)
    rare = expected < 8
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    chi2, degrees = ((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1
    assert degrees >= 20
    assert chi2 < degrees + 5 * (2 * degrees) ** 0.5
    return sum(result.num_accepted for result in results)


@torch.inference_mode()
def next_probs(decoder, prompts, temperature):
    rows = [decoder(packed_batch([list(prompt)]))[-1] / temperature for prompt in prompts]
    return torch.stack(rows).double().softmax(-1).numpy()
