"""Small checkpoints to quantise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SIZES = {"vocab_size": 70, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
         "architectures": ["LlamaForCausalLM"], "model_type": "llama"}  # fmt: skip


def layer_shapes(i: int) -> dict[str, tuple[int, ...]]:
    p = f"model.layers.{i}."
    return {
        p + "self_attn.q_proj.weight": (40, 40), p + "self_attn.k_proj.weight": (20, 40),
        p + "self_attn.v_proj.weight": (20, 40), p + "self_attn.o_proj.weight": (40, 40),
        p + "mlp.gate_proj.weight": (56, 40), p + "mlp.up_proj.weight": (56, 40),
        p + "mlp.down_proj.weight": (40, 56), p + "input_layernorm.weight": (40,),
        p + "post_attention_layernorm.weight": (40,),
    }  # fmt: skip


def random_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (70, 40), "lm_head.weight": (70, 40),
              "model.norm.weight": (40,), **layer_shapes(0), **layer_shapes(1)}  # fmt: skip
    return {n: (torch.randn(*s, generator=g) * 0.2).to(dtype) for n, s in shapes.items()}


def write_tokenizer(folder: Path) -> None:
    vocab = {chr(33 + i): i for i in range(70)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "!"}))


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**SIZES, **config}))
    write_tokenizer(folder)
    return folder


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """The weights of `plain_folder` under their Hugging Face names."""
    return random_tensors()


@pytest.fixture
def make_folder() -> Callable[..., Path]:
    """make_folder(path, tensors, **config changes) writes a checkpoint."""
    return write_folder


@pytest.fixture
def plain_folder(tmp_path: Path) -> Path:
    """A two-layer Llama in bfloat16, sizes that fill no tile."""
    return write_folder(tmp_path / "plain", random_tensors())
