"""The sizes of a model behind transformers, for the planner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sterna.core.errors import ModelFileError
from sterna.model.hf import HFDecoder
from sterna.train.longseq.foreign_graph import graph_widths
from sterna.train.longseq.foreign_proof import experts_of
from sterna.train.memory import Shape


def foreign_shape(decoder: HFDecoder) -> Shape:
    """Of a model behind transformers, whose weights may be on the meta device."""
    model = decoder.model
    config = model.config.get_text_config()
    layers = int(config.num_hidden_layers)
    block, own = _counts(decoder)
    inner, gates = _inner(model, config)
    return Shape(
        layers, config.hidden_size, inner, *_heads(config), int(config.vocab_size),
        is_tied=bool(model.config.tie_word_embeddings), gates=gates,
        counted_block=block // layers, counted_tables=own,
        graph=graph_widths(decoder) or _usual_graph(config.hidden_size, inner, gates),
        has_experts=bool(experts_of(decoder)),
    )  # fmt: skip


def shape_of_folder(path: Path, dtype: str) -> Shape:
    """Of a folder with config.json or of that file; no weights are read or made.

    Raises ModelFileError for what transformers cannot build, UnsupportedModelError as HFDecoder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    except (OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"{path}: transformers cannot build it ({error})") from error
    return foreign_shape(HFDecoder(model))


def _usual_graph(hidden: int, inner: int, gates: int) -> tuple[int, int]:
    """What a layer with float32 norms keeps, where it could not be counted."""
    return 4 * hidden, 4 * hidden + 2 * gates * inner


def _counts(decoder: HFDecoder) -> tuple[int, int]:
    """Weights of all blocks, and of everything else."""
    blocks = sum(p.numel() for p in decoder.layers.parameters())
    return blocks, sum(p.numel() for p in decoder.parameters()) - blocks


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
