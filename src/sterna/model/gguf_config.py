"""GGUF metadata as the config.json it was made from, so that one parser serves both."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sterna.core.errors import ModelFileError
from sterna.core.gguf import GGUFFile
from sterna.model.dequant import dequantize
from sterna.model.families import Family, family_of_gguf_arch

_SIZES = (  # config.json key, GGUF key behind the architecture's prefix
    ("hidden_size", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("num_hidden_layers", "block_count"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("max_position_embeddings", "context_length"),
    ("sliding_window", "attention.sliding_window"),
    ("final_logit_softcapping", "final_logit_softcapping"),
)
_TOKEN_IDS = (
    ("bos_token_id", "bos_token_id"),
    ("eos_token_id", "eos_token_id"),
    ("pad_token_id", "padding_token_id"),
)
_GEMMA3_27B_LAYERS = 62  # the one Gemma 3 whose attention scale is not by head_dim


class _Metadata:
    """Values of one architecture, by their GGUF keys."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.arch = str(file.metadata.get("general.architecture", ""))

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.arch}.{key}")

    def number(self, key: str) -> float | None:
        """A float32 as the shortest decimal that rounds to it (1e-05, not 9.99999975e-06)."""
        value = self.get(key)
        return None if value is None else float(str(np.float32(value)))

    def factors(self, name: str) -> list[float] | None:
        """The numbers of a small float tensor, None when the file has no such tensor."""
        info = self.file.tensors.get(f"{name}.weight")
        if info is None:
            return None
        raw = torch.from_numpy(self.file.tensor_bytes(info.name).copy())
        return [float(value) for value in dequantize(raw, info.type)]


def config_from_gguf(file: GGUFFile) -> tuple[Family, dict[str, Any]]:
    """The family and the config.json dictionary of a GGUF file.

    Raises UnsupportedModelError for an unknown architecture, ModelFileError for missing sizes.
    """
    meta = _Metadata(file)
    family = family_of_gguf_arch(meta.arch, str(file.path))
    values = {key: meta.get(name) for key, name in _SIZES}
    hf = {key: _scalar(key, value, file) for key, value in values.items() if value is not None}
    if "token_embd.weight" not in file.tensors:
        raise ModelFileError(f"{file.path}: tensor 'token_embd.weight' is missing; not a model")
    hf["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    hf["rms_norm_eps"] = meta.number("attention.layer_norm_rms_epsilon")
    hf["tie_word_embeddings"] = "output.weight" not in file.tensors
    hf["attention_bias"] = not family.has_qkv_bias and "blk.0.attn_q.bias" in file.tensors
    hf["architectures"] = [family.architecture]
    hf["model_type"] = family.model_type
    _add_rope(hf, meta)
    _add_family(hf, family, meta)
    known = {key: value for key, value in hf.items() if value is not None}
    # An absent id stays as null: transformers would put its class default there, which may lie
    # outside this vocabulary.
    tokens = {key: file.metadata.get(f"tokenizer.ggml.{name}") for key, name in _TOKEN_IDS}
    return family, known | tokens


def _scalar(key: str, value: Any, file: GGUFFile) -> Any:
    """One number for all layers; GGUF allows one per layer."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise ModelFileError(f"{file.path}: {key} differs by layer ({value}); it must be one value")
    return value[0]


def _add_rope(hf: dict[str, Any], meta: _Metadata) -> None:
    """`rope_parameters`, with per-frequency factors (llama3, longrope) as longrope lists."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": meta.number("rope.freq_base")}
    if rope["rope_theta"] is None:
        rope["rope_theta"] = 10_000.0
    factors = meta.factors("rope_freqs")
    short, long = meta.factors("rope_factors_short"), meta.factors("rope_factors_long")
    original = meta.get("rope.scaling.original_context_length")
    if short and long:
        rope |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        rope |= {"attention_factor": meta.number("rope.scaling.attn_factor")}
        hf["original_max_position_embeddings"] = original
    elif factors:  # Llama 3.1: the file holds the result of the scaling, not its settings
        rope |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
        rope |= {"attention_factor": 1.0}
        rope |= {"original_max_position_embeddings": hf["max_position_embeddings"]}
    elif meta.get("rope.scaling.type") in ("linear", "yarn"):
        rope["rope_type"] = meta.get("rope.scaling.type")
        rope["factor"] = meta.number("rope.scaling.factor")
        rope["original_max_position_embeddings"] = original
    hf["rope_parameters"] = {key: value for key, value in rope.items() if value is not None}


def _add_family(hf: dict[str, Any], family: Family, meta: _Metadata) -> None:
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    rotary = meta.get("rope.dimension_count")
    if rotary and rotary != head_dim:
        hf["rope_parameters"]["partial_rotary_factor"] = rotary / head_dim
    if family.name in ("qwen2", "qwen3"):
        hf["use_sliding_window"] = False
    if family.name == "gemma3":
        _add_gemma3(hf, head_dim, meta)


def _add_gemma3(hf: dict[str, Any], head_dim: int, meta: _Metadata) -> None:
    hf["hidden_activation"] = "gelu_pytorch_tanh"
    hf["sliding_window_pattern"] = 6
    is_27b = hf["num_hidden_layers"] == _GEMMA3_27B_LAYERS
    per_head = hf["hidden_size"] // hf["num_attention_heads"]
    hf["query_pre_attn_scalar"] = per_head if is_27b else head_dim
    local = meta.number("rope.freq_base_swa") or 10_000.0
    hf["rope_parameters"] = {
        "full_attention": hf["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
