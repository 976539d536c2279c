"""config.json parsing: families, older keys, defaults, and what each wrong value answers."""

from __future__ import annotations

from typing import Any

import pytest

from sterna.core.errors import ModelFileError, UnsupportedModelError
from sterna.model.config import parse_config
from sterna.model.families import FAMILIES, family_of_gguf_arch

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def parse(**changes: Any):
    return parse_config({**LLAMA, **changes}, "m/config.json")


def arch(name: str, **changes: Any):
    return parse(architectures=[name], **changes)


def test_defaults_of_a_minimal_config():
    config = parse()
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)
    assert config.layer_windows == (0, 0, 0, 0)
    assert config.layer_ropes == (0, 0, 0, 0)
    assert config.attention_scale == 0.25
    assert config.ropes[0].theta == 10_000.0
    assert not config.tie_word_embeddings


def test_eos_is_a_number_a_list_or_absent():
    assert parse(eos_token_id=7).eos_token_ids == (7,)
    assert parse(eos_token_id=[7, 9]).eos_token_ids == (7, 9)
    assert parse().eos_token_ids == ()


def test_windows_by_layer_types_and_by_the_older_keys():
    kinds = ["full_attention", "sliding_attention"] * 2
    assert arch("Qwen2ForCausalLM", layer_types=kinds, use_sliding_window=True).layer_windows == (
        (0, 4096, 0, 4096)
    )
    older = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    assert arch("Qwen2ForCausalLM", **older).layer_windows == (0, 0, 0, 8)
    assert arch("Qwen2ForCausalLM", sliding_window=8).layer_windows == (0, 0, 0, 0)
    mistral = {"num_key_value_heads": 2, "sliding_window": 8}
    assert arch("MistralForCausalLM", **mistral).layer_windows == (8, 8, 8, 8)


def test_an_explicit_null_switches_a_default_off():
    mistral = {"num_key_value_heads": 2}
    assert arch("MistralForCausalLM", **mistral).layer_windows == (4096,) * 4
    assert arch("MistralForCausalLM", **mistral, sliding_window=None).layer_windows == (0,) * 4


def test_gemma3_local_layers_have_their_own_rope():
    config = arch("Gemma3ForCausalLM", num_hidden_layers=7, sliding_window=8)
    assert config.layer_windows == (8, 8, 8, 8, 8, 0, 8)
    assert config.layer_ropes == (1, 1, 1, 1, 1, 0, 1)
    assert [rope.theta for rope in config.ropes] == [1_000_000.0, 10_000.0]
    assert config.embed_scale == 8.0


def test_gemma3_multimodal_config_gives_its_language_model():
    text = {key: value for key, value in LLAMA.items() if key != "architectures"}
    hf = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    config = parse_config({**hf, "eos_token_id": [1, 106]}, "m/config.json")
    assert config.family.name == "gemma3"
    assert config.hidden_size == 64
    assert config.eos_token_ids == (1, 106)


def test_smollm3_skips_rotation_in_every_fourth_layer():
    assert arch("SmolLM3ForCausalLM").layer_ropes == (0, 0, 0, -1)
    flags = [0, 1, 1, 1]
    assert arch("SmolLM3ForCausalLM", no_rope_layers=flags).layer_ropes == (-1, 0, 0, 0)


def test_yarn_stretches_the_length():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert parse(rope_scaling=scaling).num_positions == 1024
    assert parse().num_positions == 256


def test_unknown_architecture_names_the_nearest_and_the_known():
    with pytest.raises(UnsupportedModelError) as caught:
        arch("LlamaForCausalLN")
    message = str(caught.value)
    assert message.startswith("m/config.json: unknown architecture 'LlamaForCausalLN'")
    assert "did you mean 'LlamaForCausalLM'?" in message
    assert all(family.architecture in message for family in FAMILIES)


def test_unknown_gguf_architecture():
    with pytest.raises(UnsupportedModelError, match=r"m\.gguf: unknown GGUF architecture 'rwkv6'"):
        family_of_gguf_arch("rwkv6", "m.gguf")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"architectures": None}, UnsupportedModelError, "no `architectures` entry"),
        ({"hidden_size": None}, ModelFileError, "hidden_size is None"),
        ({"num_hidden_layers": "4"}, ModelFileError, "num_hidden_layers is '4'"),
        ({"num_key_value_heads": 3}, ModelFileError, "4 attention heads cannot share 3"),
        ({"hidden_act": "mish"}, UnsupportedModelError, "unknown activation 'mish'"),
        ({"hidden_act": "relu"}, UnsupportedModelError, "'relu' in a gated MLP"),
        ({"mlp_bias": True}, UnsupportedModelError, "mlp_bias = True is not supported"),
    ],
)
def test_wrong_values_are_named(changes, error, words):
    with pytest.raises(error, match=words):
        parse(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"do_layer_norm_before": False}, "do_layer_norm_before = False"),
        ({"word_embed_proj_dim": 32}, "word_embed_proj_dim = 32 differs from hidden_size"),
        ({"enable_bias": False}, "enable_bias = False"),
    ],
)
def test_opt_variants_that_are_refused(changes, words):
    with pytest.raises(UnsupportedModelError, match=words):
        arch("OPTForCausalLM", ffn_dim=96, **changes)


def test_config_module_imports_no_torch():
    import subprocess
    import sys

    code = "import sterna.model.config, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False"
