"""GGUF models: written by the `gguf` package as llama.cpp's converter writes them, read by us.

Each architecture's file is made from a tiny random transformers model, with the converter's own
changes (permuted Q/K rows, norms plus one), and must give that model's logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as tf

from sterna.core.errors import ModelFileError, UnsupportedModelError
from sterna.model.batch import Batch
from sterna.model.families import FAMILIES, Family
from sterna.model.load import load_config, load_model
from sterna.model.save import save_model
from sterna.model.weights import checkpoint_names

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + i for i in range(6)],
    "long_factor": [2.0 + i for i in range(6)],
    "partial_rotary_factor": 0.75,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**SIZES, attention_bias=True),
    "qwen2": lambda: tf.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: tf.Qwen3Config(**SIZES, head_dim=32),
    "phi3": lambda: tf.Phi3Config(
        **SIZES, rope_parameters=LONG, original_max_position_embeddings=64
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=8
    ),
    "smollm3": lambda: tf.SmolLM3Config(
        **{**SIZES, "num_hidden_layers": 4}, rope_parameters={"rope_theta": 5e6}
    ),
}


def random_model(arch: str) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[arch]()).float().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model


def write_gguf(model: Any, arch: str, path: Path, quantise: str | None = None) -> None:
    """What llama.cpp's convert script does to such a model."""
    family = next(family for family in FAMILIES if family.gguf_arch == arch)
    writer = gguf.GGUFWriter(str(path), arch)
    _write_metadata(writer, model.config, arch)
    kind = gguf.GGMLQuantizationType[quantise] if quantise else None
    for name, value in _tensors(model, family):
        if kind is not None and value.ndim == 2:
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_metadata(writer: gguf.GGUFWriter, config: Any, arch: str) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if arch in ("qwen3", "gemma3"):
        writer.add_key_length(config.head_dim)
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if arch == "phi3":
        writer.add_rope_dimension_count(12)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        factor = 128 / config.original_max_position_embeddings
        attention = (1 + np.log(factor) / np.log(config.original_max_position_embeddings)) ** 0.5
        writer.add_rope_scaling_attn_factors(float(attention))
        for length in ("short", "long"):
            factors = np.array(rope[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
    writer.add_eos_token_id(2)


def _tensors(model: Any, family: Family) -> list[tuple[str, np.ndarray]]:
    state = {name: value.detach().float() for name, value in model.state_dict().items()}
    config, found = model.config, []
    for own, hf_parts in family.hf_names.items():
        if own == "lm_head" and config.tie_word_embeddings:
            continue
        layers = range(config.num_hidden_layers) if "{i}" in own else [0]
        for i in layers:
            for suffix in ("weight", "bias"):
                module = f"{own.replace('{i}', str(i))}.{suffix}"
                targets = checkpoint_names(module, family.gguf_names)
                for hf, target in zip(hf_parts, targets, strict=True):
                    name = f"{hf.replace('{i}', str(i))}.{suffix}"
                    if name in state:
                        found.append((target, _converted(state[name], target, family, config)))
    return found


def _converted(value: torch.Tensor, name: str, family: Family, config: Any) -> np.ndarray:
    if family.gguf_adds_one and name.endswith("norm.weight"):
        value = value + 1
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    kind = name.split(".")[-2]
    if family.gguf_permutes_qk and kind in heads:
        shape = value.shape
        value = value.reshape(heads[kind], 2, -1, *shape[1:]).transpose(1, 2).reshape(shape)
    return value.contiguous().numpy()


def our_logits(decoder: Any, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor(tokens, dtype=torch.int32)
    positions = torch.arange(len(tokens), dtype=torch.int32)
    bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
    with torch.inference_mode():
        return decoder(Batch(ids, positions, bounds, bounds[1:]))


@pytest.mark.parametrize("arch", CONFIGS)
def test_every_architecture_gives_the_logits_of_the_model_it_was_made_from(arch, tmp_path):
    model = random_model(arch)
    path = tmp_path / "m.gguf"
    write_gguf(model, arch, path)
    loaded = load_model(path, "float32")
    tokens = [5, 9, 60, 3, 77, 41, 8, 30, 11, 12, 13, 14, 15]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    assert (our_logits(loaded.decoder, tokens) - expected).abs().max() <= 1e-4
    assert loaded.config.eos_token_ids == (2,)
    assert loaded.source == path


@pytest.mark.parametrize("arch", CONFIGS)
def test_a_gguf_saved_as_a_folder_is_read_by_transformers(arch, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(random_model(arch), arch, path)
    decoder = load_model(path, "float32").decoder
    save_model(decoder, tmp_path / "hf")
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = [5, 9, 60, 3, 77, 41, 8, 30, 11, 12, 13, 14, 15]
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    assert (our_logits(decoder, tokens) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_quantised_files_load_in_every_dtype(kind, tmp_path):
    """The bfloat16 weights are the float32 ones rounded once."""
    path = tmp_path / "m.gguf"
    write_gguf(random_model("qwen2"), "qwen2", path, quantise=kind)
    exact = dict(load_model(path, "float32").decoder.named_parameters())
    for name, rounded in load_model(path, "bfloat16").decoder.named_parameters():
        assert torch.equal(rounded, exact[name].bfloat16()), name


def test_llama3_frequency_factors_of_a_gguf(tmp_path):
    model = random_model("llama")
    path = tmp_path / "m.gguf"
    factors = np.array([1.0, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0], np.float32)
    writer = gguf.GGUFWriter(str(path), "llama")
    _write_metadata(writer, model.config, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((96, 64), np.float32))
    writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rope = load_config(path).ropes[0]
    assert (rope.rope_type, rope.attention_factor) == ("longrope", 1.0)
    assert rope.short_factor == rope.long_factor == tuple(factors.tolist())


def test_missing_tensor_names_file_and_tensor(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    _write_metadata(writer, CONFIGS["llama"](), "llama")
    writer.add_tensor("token_embd.weight", np.zeros((96, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match=r"m\.gguf: tensor 'blk\.0\.\S+' is missing"):
        load_model(path)


def test_unsupported_tensor_type_names_it_and_the_supported(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    _write_metadata(writer, CONFIGS["llama"](), "llama")
    raw = np.zeros((96, 2 * 34), np.uint8)
    writer.add_tensor("token_embd.weight", raw[:, :36], raw_dtype=gguf.GGMLQuantizationType.IQ4_NL)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"has type IQ4_NL; supported: F32, F16.*Q6_K"):
        load_model(path)


def test_a_file_without_embeddings_is_not_a_model(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    _write_metadata(writer, CONFIGS["llama"](), "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match=r"'token_embd\.weight' is missing"):
        load_config(path)
