"""Rope frequencies and attention factors against transformers' own, type by type."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sterna.core.errors import ModelFileError, UnsupportedModelError
from sterna.model.rope import attention_scaling, inverse_frequencies, rope_table
from sterna.model.rope_config import parse_rope

HEAD_DIM = 32
CASES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-mscale": {
        "factor": 40.0,
        "original_max_position_embeddings": 128,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "beta_fast": 16.0,
        "truncate": False,
    },
    "longrope": {
        "short_factor": [1.0 + i / 8 for i in range(HEAD_DIM // 2)],
        "long_factor": [3.0 + i for i in range(HEAD_DIM // 2)],
        "original_max_position_embeddings": 128,
    },
}


def hf_config(name: str) -> LlamaConfig:
    rope = {"rope_type": name.split("-")[0], "rope_theta": 5000.0, **CASES[name]}
    return LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters=rope,
    )


@pytest.mark.parametrize("name", CASES)
def test_frequencies_equal_transformers(name):
    config = hf_config(name)
    expected, scaling = ROPE_INIT_FUNCTIONS[name.split("-")[0]](config, "cpu")
    rope = parse_rope(config.to_dict(), HEAD_DIM, "test")
    assert torch.equal(inverse_frequencies(rope), expected)
    assert attention_scaling(rope) == scaling


def test_table_rows_are_cos_then_sin():
    rope = parse_rope({"rope_theta": 100.0, "max_position_embeddings": 8}, 4, "test")
    table = rope_table(rope, 8)
    angle = 3 * torch.tensor([1.0, 0.1])
    assert table.shape == (8, 4)
    assert (table[3] - torch.cat([angle.cos(), angle.sin()])).abs().max() < 1e-6


def test_longrope_stacks_the_long_table_behind_the_short_one():
    config = hf_config("longrope")
    rope = parse_rope(config.to_dict(), HEAD_DIM, "test")
    table = rope_table(rope, 512)
    long_freq, scaling = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=400)
    assert table.shape == (128 + 512, HEAD_DIM)
    expected = torch.cos(300 * long_freq) * scaling
    assert (table[128 + 300, : HEAD_DIM // 2] - expected).abs().max() < 1e-6


def test_old_and_new_keys_mean_the_same():
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}
    old = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0}
    assert parse_rope(new, 64, "test") == parse_rope(old, 64, "test")


@pytest.mark.parametrize("word", ["su", "yarn"])
def test_phi3_older_words_for_longrope(word):
    factors = [1.0] * 32
    scaling = {"type": word, "short_factor": factors, "long_factor": factors}
    hf = {"rope_scaling": scaling, "original_max_position_embeddings": 64}
    rope = parse_rope(hf, 64, "test")
    assert (rope.rope_type, rope.original_max_positions) == ("longrope", 64)


def test_unknown_type_and_missing_parameters_are_named():
    with pytest.raises(UnsupportedModelError, match=r"unknown rope_type 'yarnn'.*'yarn'"):
        parse_rope({"rope_scaling": {"rope_type": "yarnn"}}, 64, "x/config.json")
    with pytest.raises(ModelFileError, match=r"x/config.json: rope_type 'llama3' needs 'factor'"):
        parse_rope({"rope_scaling": {"rope_type": "llama3"}}, 64, "x/config.json")
    short = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
    with pytest.raises(ModelFileError, match="short_factor has 1 numbers; 32 are needed"):
        parse_rope({"rope_scaling": short}, 64, "x/config.json")


def test_tables_follow_the_device_but_not_the_dtype():
    from sterna.model.config import parse_config
    from sterna.model.decoder import Decoder

    config = parse_config(hf_config("linear").to_dict() | ARCH, "test")
    decoder = Decoder(config).to(torch.bfloat16)
    assert decoder.embed_tokens.weight.dtype == torch.bfloat16
    assert decoder.ropes.tables[0].dtype == torch.float32
    assert decoder.to("meta").ropes.tables[0].device.type == "meta"


ARCH = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "vocab_size": 8}
