"""Folders in and out: shards, ties, dtypes, and every way a folder can be wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from sterna.core.errors import (
    ConfigError,
    ModelError,
    ModelFileError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from sterna.model.load import load_config, load_model
from sterna.model.save import save_model

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "qwen2-tied": lambda: tf.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "phi3": lambda: tf.Phi3Config(**SIZES),
    "gemma3": lambda: tf.Gemma3TextConfig(**SIZES, head_dim=16),
    "opt": lambda: tf.OPTConfig(
        vocab_size=96,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
}


def make(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **kwargs: Any):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype)
    model.save_pretrained(folder, **kwargs)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_is_read_back_by_transformers_bit_by_bit(name, dtype, tmp_path):
    model = make(tmp_path / "a", name, getattr(torch, dtype))
    save_model(load_model(tmp_path / "a", dtype).decoder, tmp_path / "b")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert again.dtype == model.dtype
    expected = model.state_dict()
    got = again.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_saving_in_shards_and_reading_them(tmp_path):
    model = make(tmp_path / "a")
    save_model(load_model(tmp_path / "a", "float32").decoder, tmp_path / "b", 20_000)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    ours = load_model(tmp_path / "b", "float32").decoder
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)
    assert torch.equal(ours.embed_tokens.weight, model.model.embed_tokens.weight)


def test_reading_the_shards_of_transformers(tmp_path):
    model = make(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    decoder = load_model(tmp_path, "float32").decoder
    q, k, v = torch.split(decoder.layers[1].attn.qkv.weight, [32, 16, 16])
    attn = model.model.layers[1].self_attn
    for ours, theirs in ((q, attn.q_proj), (k, attn.k_proj), (v, attn.v_proj)):
        assert torch.equal(ours, theirs.weight)


def test_loading_casts_to_the_asked_dtype(tmp_path):
    model = make(tmp_path)
    decoder = load_model(tmp_path, "bfloat16").decoder
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    assert torch.equal(decoder.norm.weight, model.model.norm.weight.bfloat16())


def test_parameters_can_be_trained_after_loading(tmp_path):
    make(tmp_path)
    decoder = load_model(tmp_path, "float32").decoder
    assert all(p.requires_grad for p in decoder.parameters())
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        decoder.norm.weight.add_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_generation_config_adds_stop_tokens(tmp_path):
    make(tmp_path)
    edit_config(tmp_path, eos_token_id=2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert load_config(tmp_path).eos_token_ids == (7, 2)


def test_a_checkpoint_without_lm_head_is_tied(tmp_path):
    make(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path, "float32")
    assert loaded.config.tie_word_embeddings
    assert loaded.decoder.lm_head is None


def test_base_model_and_multimodal_names_are_found(tmp_path):
    make(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    inner = {name.removeprefix("model."): value for name, value in tensors.items()}
    save_file({**inner, "lm_head.weight": head}, tmp_path / "model.safetensors")
    base = load_model(tmp_path, "float32").decoder
    deeper = {f"model.language_model.{name}": value for name, value in inner.items()}
    save_file({**deeper, "lm_head.weight": head}, tmp_path / "model.safetensors")
    multimodal = load_model(tmp_path, "float32").decoder
    for a, b in zip(base.parameters(), multimodal.parameters(), strict=True):
        assert torch.equal(a, b)


def test_prepared_models_give_the_same_logits_and_are_not_saved(tmp_path):
    from sterna.model.batch import Batch

    make(tmp_path)
    decoder = load_model(tmp_path, "float32").decoder
    tokens = torch.arange(9, dtype=torch.int32)
    bounds = torch.tensor([0, 9], dtype=torch.int32)
    batch = Batch(tokens, tokens, bounds, bounds[1:])
    with torch.inference_mode():
        before = decoder(batch)
    decoder.prepare_inference()
    decoder.prepare_inference()
    assert not any(p.requires_grad for p in decoder.parameters())
    with torch.inference_mode():
        assert (decoder(batch) - before).abs().max() <= 1e-5
    if any(p.dim() == 4 for p in decoder.parameters()):
        with pytest.raises(ModelError, match="save it before prepare_inference"):
            save_model(decoder, tmp_path / "b")


def test_kv_layers_follow_the_model(tmp_path):
    make(tmp_path)
    decoder = load_model(tmp_path, "bfloat16").decoder
    layers = decoder.new_kv_layers(5, 16)
    assert len(layers) == 2
    assert layers[0].shape == (5, 2, 2 * 16 * 8)
    assert layers[0].dtype == torch.bfloat16
    assert not layers[0].any()


def _no_folder(folder: Path) -> Path:
    return folder / "absent"


def _text_file(folder: Path) -> Path:
    (folder / "m.txt").write_text("x")
    return folder / "m.txt"


def _no_config(folder: Path) -> Path:
    (folder / "config.json").unlink()
    return folder


def _bad_json(folder: Path) -> Path:
    (folder / "config.json").write_text("{")
    return folder


def _json_list(folder: Path) -> Path:
    (folder / "config.json").write_text("[]")
    return folder


def _no_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def _only_pickle(folder: Path) -> Path:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def _truncated(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return folder


def _empty_weights(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def _missing_tensor(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    return folder


def _wrong_shape(folder: Path) -> Path:
    edit_config(folder, intermediate_size=64)
    return folder


def _quantised(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, folder / "model.safetensors")
    return folder


def _missing_shard(folder: Path) -> Path:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _bad_index(folder: Path) -> Path:
    (folder / "model.safetensors.index.json").write_text("{}")
    return folder


def _unknown_architecture(folder: Path) -> Path:
    edit_config(folder, architectures=["FalconForCausalLM"])
    return folder


def _not_gguf(folder: Path) -> Path:
    (folder / "m.gguf").write_bytes(b"GGML" + bytes(64))
    return folder / "m.gguf"


FAULTS: list[tuple[Any, type[Exception], str]] = [
    (_no_folder, ModelNotFoundError, r"absent: no such file or folder"),
    (_text_file, ModelFileError, r"m\.txt: a \.txt file; supported: a folder"),
    (_no_config, ModelFileError, r"no config\.json \(found .*model\.safetensors"),
    (_bad_json, ModelFileError, r"config\.json: not valid JSON"),
    (_json_list, ModelFileError, r"config\.json: holds a list, an object is needed"),
    (_no_weights, ModelFileError, r"found no weights; needed: model\.safetensors"),
    (_only_pickle, ModelFileError, r"found only pytorch_model\.bin \(pickle is not read\)"),
    (_truncated, ModelFileError, r"model\.safetensors: truncated or damaged .*bytes"),
    (_empty_weights, ModelFileError, r"model\.safetensors: truncated or damaged .* 0 bytes"),
    (_missing_tensor, ModelFileError, r"'model\.layers\.1\.mlp\.up_proj\.weight' is in no"),
    (_wrong_shape, ModelFileError, r"has shape \(96, 32\), the config asks for \(128, 32\)"),
    (_quantised, UnsupportedModelError, r"has dtype torch\.int8; supported: float64"),
    (_missing_shard, ModelFileError, r"model-00001-of-00002\.safetensors: missing"),
    (_bad_index, ModelFileError, r"index\.json: not a safetensors index"),
    (_unknown_architecture, UnsupportedModelError, r"unknown architecture 'FalconForCausalLM'"),
    (_not_gguf, ModelFileError, r"m\.gguf: not a GGUF file"),
]


@pytest.mark.parametrize(
    ("damage", "error", "words"), FAULTS, ids=lambda f: getattr(f, "__name__", "")
)
def test_every_fault_names_the_file_and_what_was_found(damage, error, words, tmp_path):
    make(tmp_path)
    with pytest.raises(error, match=words) as caught:
        load_model(damage(tmp_path), "float32")
    assert str(tmp_path) in str(caught.value)


def test_unknown_dtype_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="unknown dtype 'bfloat'; did you mean 'bfloat16'"):
        load_model(tmp_path, "bfloat")


def test_configs_compare_by_value(tmp_path):
    make(tmp_path)
    config = load_config(tmp_path)
    assert config == load_config(tmp_path)
    assert config != replace(config, vocab_size=97)
