"""The real model in six bits: from its GGUF file to a folder that is served, in one go."""

from __future__ import annotations

import time

import pytest
import torch

from sterna import LLM, SamplingParams
from sterna.core.errors import ModelNotFoundError
from sterna.model.batch import Batch
from sterna.model.hub import resolve_model
from sterna.model.load import load_model
from sterna.quant.calibrate import random_mean_squares
from sterna.quant.convert import QuantizeOptions, quantize_folder
from sterna.quant.formats import parse_format
from sterna.quant.load import load_quantized
from sterna.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.real
CHAT = [{"role": "user", "content": "What is the capital of Japan?"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(GGUF path, quantised folder, report)."""
    try:
        path = resolve_model("")
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("fp6") / "out"
    importance = random_mean_squares(load_model(path).decoder)
    options = QuantizeOptions(
        parse_format("fp6"), search="fast", importance=importance, is_measured=False
    )
    return path, out, quantize_folder(path, out, options)


def test_it_is_quick_and_small(made):
    """Goals: under 5 s (2.8 measured; the factor is for a busy machine), under 6.1 bits."""
    report = made[2]
    assert report.seconds < 5 * 4
    assert report.num_parameters == 134_515_008
    assert report.bits_per_weight < 6.1


def test_loading_maps_the_file(made):
    started = time.perf_counter()
    load_quantized(made[1])
    assert time.perf_counter() - started < 0.5 * 4  # 0.05 s measured, checksums compared


def test_the_tokenizer_is_the_same(made):
    ours, theirs = load_tokenizer(made[1]), load_tokenizer(made[0])
    text = "Grüße, 3,141 <|im_start|>user\n\tdef f(x): return x ** 2"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.chat_template == theirs.chat_template
    assert ours.eos_token_ids == theirs.eos_token_ids
    assert ours.bos_token_id == theirs.bos_token_id


def test_distributions_stay_close_to_bfloat16(made):
    """Mean KL and top-1 agreement on a short text; the bounds are twice what was measured."""
    text = "The tides are caused by the pull of the moon and, less, of the sun. " * 3
    tokens = load_tokenizer(made[0]).encode(text)
    n = len(tokens)
    batch = Batch(torch.tensor(tokens).int(), torch.arange(n).int(), torch.tensor([0, n]).int(),
                  torch.tensor([n]).int())  # fmt: skip
    with torch.inference_mode():
        ours = load_quantized(made[1], "float32").decoder(batch).log_softmax(-1)
        plain = load_quantized(made[0], "float32").decoder(batch).log_softmax(-1)
    kl = (plain.exp() * (plain - ours)).sum(-1).mean()
    agreement = (ours.argmax(-1) == plain.argmax(-1)).float().mean()
    assert kl < 0.07
    assert agreement > 0.8


@pytest.mark.slow
def test_the_folder_chats(made):
    with LLM(str(made[1]), token_budget=64) as llm:
        (answer,) = llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=12))
    assert "Tokyo" in answer.text
