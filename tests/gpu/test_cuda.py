"""A CUDA device runs the reference ops: the same logits and tokens as a CPU, float32.

Run with `pytest tests/gpu -m gpu`. One case per thing that lives on the device: the rope tables
(two for LongRope), sliding windows, learned positions; then the engine, whose inputs are uploaded
each step, with cut prompts, prefix hits, forks and preemption.
"""

from __future__ import annotations

import random

import pytest
import torch
import transformers as tf

from sterna.engine.config import EngineConfig
from sterna.engine.engine import Engine
from sterna.engine.llm import LLM
from sterna.engine.memory import EngineShape
from sterna.engine.request import EngineRequest, SamplingParams
from sterna.model.batch import Batch
from sterna.model.load import load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
VOCAB = 160
# Float32 sums of some hundred terms in another order; TF32 is off for matrix products by default.
TOLERANCE = 1e-4
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}
CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "mistral": lambda: tf.MistralConfig(**SIZES, sliding_window=24),
    "phi3": lambda: tf.Phi3Config(
        **SIZES, rope_parameters=LONGROPE, original_max_position_embeddings=32
    ),
    "opt": lambda: tf.OPTConfig(
        vocab_size=VOCAB, hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=256, word_embed_proj_dim=64, init_std=0.1,
    ),
}  # fmt: skip


class NoText:
    """The engine's tests here are about tokens."""

    eos_token_ids = ()

    def encode(self, text, add_special_tokens=True):
        return [ord(char) % VOCAB for char in text]

    def incremental(self, skip_special_tokens=True, *, keep_leading_space=False):
        return self

    def push(self, ids):
        return ""

    def flush(self):
        return ""


@pytest.fixture(params=list(CONFIGS))
def folder(request, tmp_path):
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(CONFIGS[request.param]()).save_pretrained(tmp_path)
    return tmp_path


def prompts(count, longest, seed=0):
    draw = random.Random(seed)
    return [
        tuple(draw.randrange(3, VOCAB) for _ in range(draw.randint(1, longest)))
        for _ in range(count)
    ]


def packed(sequences, device):
    """A training batch (kv=None) of whole sequences on `device`."""
    lengths = [len(sequence) for sequence in sequences]
    tokens = [token for sequence in sequences for token in sequence]
    positions = [position for length in lengths for position in range(length)]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    fields = (torch.tensor(tokens), torch.tensor(positions), starts, torch.tensor(lengths))
    return Batch(*(field.int().to(device) for field in fields))


@torch.inference_mode()
def test_logits_equal_those_of_the_cpu(folder):
    given = prompts(3, 60)
    want = load_model(folder, dtype="float32").decoder(packed(given, "cpu"))
    got = load_model(folder, dtype="float32", device=DEVICE).decoder(packed(given, DEVICE))
    assert got.device.type == DEVICE
    assert (got.cpu() - want).abs().max() <= TOLERANCE


def tokens_of(folder, device, given, params, **settings):
    """What an engine on `device` says to each prompt, and how often it preempted."""
    decoder = load_model(folder, dtype="float32", device=device).decoder
    decoder.prepare_inference()
    settings = {"token_budget": 24, "max_num_seqs": 8, "device": device, **settings}
    shape = EngineShape(VOCAB, 192, settings.pop("num_blocks"))
    engine = Engine(decoder, NoText(), EngineConfig(**settings), shape)
    stats, found = [], {}
    engine.on_step.append(stats.append)
    for i, prompt in enumerate(given):
        engine.add(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params))
    while engine.has_work:
        for output in engine.step():
            for delta in output.deltas:
                assert delta.error is None, delta.error
                key = (output.request_id, delta.index)
                found[key] = found.get(key, ()) + delta.token_ids
    engine.check_integrity()
    return found, sum(step.num_preempted for step in stats)


@pytest.mark.parametrize("num_blocks", [200, 14])
def test_the_engine_says_the_same_as_on_a_cpu(folder, num_blocks):
    given = prompts(8, 60, seed=1)
    given += [given[0] + given[1], given[0] + given[2]]  # shared prefixes
    params = SamplingParams(temperature=0, max_tokens=24, n=2, prompt_logprobs=1)
    want, _ = tokens_of(folder, "cpu", given, params, num_blocks=200)
    got, num_preempted = tokens_of(folder, DEVICE, given, params, num_blocks=num_blocks)
    assert got == want
    assert (num_preempted > 0) == (num_blocks < 200)


@pytest.mark.real
def test_the_default_model_answers_in_bfloat16():
    with LLM(device=DEVICE, token_budget=128, num_kv_blocks=100) as llm:
        question = [{"role": "user", "content": "What is the capital of Japan?"}]
        (answer,) = llm.chat(question, SamplingParams(temperature=0, max_tokens=16))
    assert "Tokyo" in answer.text
