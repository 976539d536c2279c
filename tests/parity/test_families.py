"""Every family against transformers: tiny random models, float32.

Cases: one row per family and option that changes the forward. Sizes are the smallest at which
heads are grouped (4 query, 2 key/value), the window (24) ends inside the sequence, and every
block border of the paged cache (16) is crossed. Initialisation is wide (std 0.1) so that logits
differ by more than rounding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf

from sterna.model.load import load_model

TOLERANCE = 1e-4  # the project's bound on |delta logit| in float32
STEPS = 64
PROMPT_LEN = 40

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT_SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "word_embed_proj_dim": 64,
    "init_std": 0.1,
}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **values}}


LONGROPE = _rope(
    "longrope",
    short_factor=[1.0 + 0.1 * i for i in range(6)],
    long_factor=[2.0 + 0.5 * i for i in range(6)],
    partial_rotary_factor=0.75,
)
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 24}

CASES: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "llama-tied-bias": lambda: tf.LlamaConfig(
        **SIZES, tie_word_embeddings=True, attention_bias=True, head_dim=32
    ),
    "llama-linear": lambda: tf.LlamaConfig(**SIZES, **_rope("linear", factor=4.0)),
    "llama-dynamic": lambda: tf.LlamaConfig(**SIZES, **_rope("dynamic", factor=4.0)),
    "llama-llama3": lambda: tf.LlamaConfig(
        **SIZES,
        **_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-yarn": lambda: tf.LlamaConfig(
        **SIZES, **_rope("yarn", factor=4.0, original_max_position_embeddings=64)
    ),
    "mistral-window": lambda: tf.MistralConfig(**SIZES, sliding_window=24),
    "mistral-full": lambda: tf.MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: tf.Qwen2Config(**SIZES),
    "qwen2-window": lambda: tf.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=24, max_window_layers=2
    ),
    "qwen3": lambda: tf.Qwen3Config(**SIZES, head_dim=32),
    "phi3": lambda: tf.Phi3Config(**SIZES),
    "phi3-longrope-short": lambda: tf.Phi3Config(
        **SIZES, **LONGROPE, original_max_position_embeddings=200
    ),
    "phi3-longrope-long": lambda: tf.Phi3Config(
        **SIZES, **LONGROPE, original_max_position_embeddings=32
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 7}, **GEMMA),
    "gemma3-softcap": lambda: tf.Gemma3TextConfig(
        **SIZES, **GEMMA, final_logit_softcapping=30.0, layer_types=LOCAL_GLOBAL
    ),
    "smollm3": lambda: tf.SmolLM3Config(**SIZES),
    "opt": lambda: tf.OPTConfig(**OPT_SIZES),
    "opt-untied": lambda: tf.OPTConfig(**OPT_SIZES, tie_word_embeddings=False),
}
LOCAL_GLOBAL = ["sliding_attention", "full_attention"] * 2


@pytest.fixture(params=list(CASES))
def pair(request, save_hf):
    """(transformers model, sterna decoder) with the same random weights."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CASES[request.param]()).float().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms start at 1 (Gemma's at 0), biases at 0
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model, load_model(save_hf(model), "float32").decoder


def _prompt(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 160, (length,), generator=generator).tolist()


@torch.inference_mode()
def _hf_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0]


def test_greedy_tokens_and_logits_equal_transformers(pair, paged):
    """64 greedy steps through the paged cache; transformers sees each whole sequence at once."""
    model, decoder = pair
    prompt = _prompt(PROMPT_LEN)
    tokens, logits = paged(decoder).greedy(prompt, STEPS)
    expected = _hf_logits(model, prompt + tokens)[PROMPT_LEN - 1 : -1]
    assert (logits - expected).abs().max() <= TOLERANCE
    assert tokens == expected.argmax(-1).tolist()


def test_packed_sequences_equal_transformers_alone(pair, packed):
    """Training batch: three sequences packed give each one's own logits."""
    model, decoder = pair
    sequences = [_prompt(50, 1), _prompt(1, 2), _prompt(40, 3)]
    offset = decoder.rope_row_offset(50)
    with torch.inference_mode():
        logits = decoder(packed(sequences, offset))
    rows = torch.split(logits, [len(s) for s in sequences])
    for tokens, ours in zip(sequences, rows, strict=True):
        if offset and len(tokens) < 32:  # transformers picks the LongRope table by this length
            continue
        assert (ours - _hf_logits(model, tokens)).abs().max() <= TOLERANCE


def test_chunked_equals_whole(pair, paged):
    """Chunks that end on and off block borders, mixed with another sequence's decode."""
    _, decoder = pair
    prompt, offset = _prompt(PROMPT_LEN), decoder.rope_row_offset(PROMPT_LEN)
    whole, chunked = paged(decoder), paged(decoder)
    whole.add("a", offset)
    expected = whole.step({"a": prompt})
    chunked.add("a", offset)
    chunked.add("b", offset)
    pieces, begin = [], 0
    for size in (5, 11, 17, 7):
        logits = chunked.step({"b": [7], "a": prompt[begin : begin + size]})
        pieces.append(logits[1:])
        begin += size
    assert (torch.cat(pieces) - expected).abs().max() <= TOLERANCE


def test_output_rows_select_without_changing_values(pair, packed):
    _, decoder = pair
    batch = packed([_prompt(20, 1), _prompt(9, 2)])
    rows = torch.tensor([28, 3, 19], dtype=torch.int32)
    with torch.inference_mode():
        whole = decoder.hidden(batch)
        some = decoder.hidden(replace(batch, output_rows=rows))
    assert (some - whole[rows]).abs().max() <= 1e-5


def test_gradients_reach_every_parameter(pair, packed):
    """A training batch is differentiable and agrees with transformers' gradients."""
    model, decoder = pair
    tokens = _prompt(40)
    target = torch.tensor(tokens[1:])
    offset = decoder.rope_row_offset(len(tokens))
    logits = decoder(packed([tokens], offset))
    torch.nn.functional.cross_entropy(logits[:-1], target).backward()
    theirs = model(torch.tensor([tokens])).logits[0]
    torch.nn.functional.cross_entropy(theirs[:-1], target).backward()
    missing = [name for name, p in decoder.named_parameters() if p.grad is None]
    assert missing == []
    ours = decoder.embed_tokens.weight.grad
    expected = model.get_input_embeddings().weight.grad
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-6
