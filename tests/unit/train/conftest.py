"""Tiny decoders and packed batches for the training tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sterna.kernels.load import load_kernels
from sterna.model.batch import Batch
from sterna.model.config import parse_config
from sterna.model.decoder import Decoder

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_QWEN = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}
_GEMMA = {
    "query_pre_attn_scalar": 24,
    "sliding_window": 24,
    "final_logit_softcapping": 30.0,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "hidden_activation": "gelu_pytorch_tanh",
}
_OPT = {"ffn_dim": 96, "hidden_act": "relu", "word_embed_proj_dim": 64, "head_dim": None}

# One config a row of the family table; the options are those that change what layers share.
FAMILY_CONFIGS = {
    "llama": ("LlamaForCausalLM", "llama", {}),
    "llama-tied-bias": (
        "LlamaForCausalLM", "llama", {"tie_word_embeddings": True, "attention_bias": True}
    ),
    "mistral": ("MistralForCausalLM", "mistral", {"sliding_window": 24}),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", _QWEN),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", {}),
    "phi3": ("Phi3ForCausalLM", "phi3", {}),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text", _GEMMA),
    "smollm3": ("SmolLM3ForCausalLM", "smollm3", {"no_rope_layer_interval": 4}),
    "opt": ("OPTForCausalLM", "opt", _OPT),
}  # fmt: skip


def hf_config(name: str = "llama") -> dict:
    architecture, model_type, changes = FAMILY_CONFIGS[name]
    return {"architectures": [architecture], "model_type": model_type, **SIZES, **changes}


def new_decoder(name: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    """Random weights; norms near 1 and biases near 0, as a trained model's are."""
    load_kernels()
    decoder = Decoder(parse_config(hf_config(name), name), dtype)
    generator = torch.Generator().manual_seed(seed)
    offset = 0.0 if decoder.config.family.has_unit_offset else 1.0
    for key, p in decoder.named_parameters():
        noise = torch.randn(p.shape, generator=generator) * 0.1
        is_norm = p.dim() == 1 and key.endswith("norm.weight")
        p.data.copy_(noise + offset if is_norm else noise)
    return decoder


def packed_batch(sequences: list[list[int]]) -> Batch:
    lengths = [len(s) for s in sequences]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.tensor([p for n in lengths for p in range(n)], dtype=torch.int32)
    tokens = torch.tensor([t for s in sequences for t in s], dtype=torch.int32)
    return Batch(tokens, positions, starts, torch.tensor(lengths, dtype=torch.int32))


def random_tokens(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 160, (length,), generator=generator).tolist()


@pytest.fixture
def decoder_of():
    return new_decoder


@pytest.fixture
def packed():
    return packed_batch


@pytest.fixture
def tokens_of():
    return random_tokens


@pytest.fixture(params=list(FAMILY_CONFIGS))
def family_name(request):
    return request.param


def load_tiny() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny", Path(__file__).with_name("tiny.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    load_kernels()
    torch.set_num_threads(1)
    return load_tiny()
