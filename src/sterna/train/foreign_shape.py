"""The sizes of a model behind transformers, for the planner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sterna.core.errors import ModelFileError
from sterna.train.memory import Shape


def foreign_shape(model: Any) -> Shape:
    """Of a transformers model, whose weights may be on the meta device."""
    config = model.config.get_text_config()
    layers, vocab = int(config.num_hidden_layers), int(config.vocab_size)
    block, own = _counts(model, layers)
    heads, kv_heads, head_dim = _heads(config)
    inner, gates = _inner(model, config)
    return Shape(
        layers, config.hidden_size, inner, heads, kv_heads, head_dim, vocab,
        is_tied=bool(model.config.tie_word_embeddings), gates=gates,
        counted_block=block // layers, counted_tables=own, is_foreign=True,
    )  # fmt: skip


def shape_of_folder(path: Path) -> Shape:
    """Of a folder with config.json or of that file; no weights are read or made.

    Raises ModelFileError for what transformers cannot build.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"{path}: transformers cannot build it ({error})") from error
    return foreign_shape(model)


def _counts(model: Any, layers: int) -> tuple[int, int]:
    """Weights of all blocks, and of everything else."""
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)
    blocks = sum(p.numel() for p in next(lists).parameters())
    return blocks, sum(p.numel() for p in model.parameters()) - blocks


def _heads(config: Any) -> tuple[int, int, int]:
    """(query heads, key/value heads, head size), under the names that configs use."""
    heads = int(config.num_attention_heads)
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        kv_heads = 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, int(kv_heads or heads), int(head_dim)


def _inner(model: Any, config: Any) -> tuple[int, int]:
    """(numbers a token is widened to inside the MLP, matrices that do it).

    Of experts: those of one token together.
    """
    chosen = int(getattr(config, "num_experts_per_tok", None) or 0)
    if chosen:
        own = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        shared = getattr(config, "shared_expert_intermediate_size", None) or 0
        return chosen * int(own) + int(shared), 2
    names = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
    found = (getattr(config, name, None) for name in names)
    inner = next((int(size) for size in found if size), 4 * int(config.hidden_size))
    is_gated = any("gate" in name for name, _ in model.named_parameters())
    return inner, 2 if is_gated else 1
