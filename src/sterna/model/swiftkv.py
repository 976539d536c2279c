"""SwiftKV (arXiv 2410.03960): the later layers' keys and values from one hidden state.

x_k, the output of layer k - 1, is normed once; every later layer's keys and values are
projections of it, so a prompt token needs no more than the first k layers and these projections:

    s = norm_swiftkv(x_k)
    q_i = q_proj_swiftkv_i(attn_norm_i(h_i))       i = k .. L - 1
    K, V = kv_proj_swiftkv_j(s)                    j = the first layer of i's group

Groups (AcrossKV) are consecutive layers that share one pair of keys and values. A cached key is
already rotated, so a group ends early where the rotation changes (Gemma 3's local layers, SmolLM3's
unrotated ones). A key's head norm, where a family has one, is that of its group's first layer.
Everything else is the original model's.

A checkpoint is the original folder without the replaced projections, under an architecture and
model_type of its own, so that nothing loads it as the original:

    config.json    architectures ["LlamaSwiftKVForCausalLM"], model_type "llama_swiftkv",
                   swiftkv {version, num_key_value_layers, key_value_group_size, architecture,
                   model_type}
    tensors        model.norm_swiftkv, model.layers.{i}.self_attn.{q,k,v}_proj_swiftkv

Training only (kv=None); the values of a row do not depend on which other rows are computed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sterna.core.errors import ConfigError, ModelFileError, UnsupportedModelError
from sterna.kernels import ops
from sterna.kernels.load import load_kernels
from sterna.model.batch import Batch
from sterna.model.config import ModelConfig, parse_config
from sterna.model.decoder import Decoder
from sterna.model.families import Names
from sterna.model.hf_weights import SafetensorsSource
from sterna.model.layers import Attention, Block, Linear, new_norm
from sterna.model.load import DTYPES, DTypeName
from sterna.model.save import hf_config
from sterna.model.weights import assign

SECTION, VERSION = "swiftkv", 1
_MARK, _END = "SwiftKV", "ForCausalLM"


@dataclass(frozen=True, slots=True)
class SwiftKVConfig:
    """k: layers that run on every token; group size: later layers that share keys and values."""

    num_key_value_layers: int
    key_value_group_size: int = 1

    def check(self, config: ModelConfig) -> None:
        """ConfigError for a k that leaves no layer before or after it, or an impossible group."""
        layers, k = config.num_hidden_layers, self.num_key_value_layers
        if not 1 <= k < layers:
            raise ConfigError(
                f"num_key_value_layers is {k}; of {layers} layers 1 to {layers - 1} can be kept"
            )
        if self.key_value_group_size < 1:
            raise ConfigError(
                f"key_value_group_size is {self.key_value_group_size}; 1 (no sharing) or more"
            )


def owners(config: ModelConfig, swift: SwiftKVConfig) -> dict[int, int]:
    """Layer -> the layer whose keys and values it reads, for every layer from k on."""
    found: dict[int, int] = {}
    first, size = -1, 0
    for i in range(swift.num_key_value_layers, config.num_hidden_layers):
        is_full = first < 0 or size == swift.key_value_group_size
        if is_full or config.layer_ropes[i] != config.layer_ropes[first]:
            first, size = i, 0
        found[i] = first
        size += 1
    return found


class SwiftAttention(Attention):
    """Attention whose queries and whose keys and values come from different hidden states."""

    kv_swiftkv: Linear | None

    def __init__(
        self,
        config: ModelConfig,
        layer_idx: int,
        owner_idx: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(config, layer_idx, dtype, torch.device("meta"))
        del self.qkv
        self.to_empty(device=device)
        num_heads, num_kv_heads, head_dim = self.heads
        hidden, bias = config.hidden_size, config.has_qkv_bias
        self.q_swiftkv = Linear(hidden, num_heads * head_dim, bias, dtype, device)
        self.is_owner = owner_idx == layer_idx
        self.kv_swiftkv = None
        if self.is_owner:
            self.kv_swiftkv = Linear(hidden, 2 * num_kv_heads * head_dim, bias, dtype, device)
        else:
            self.k_norm = None

    def forward(self, x: Tensor, batch: Batch, table: Tensor | None) -> Tensor:
        """Refused: a layer of this kind needs the keys and values too, see SwiftKVDecoder."""
        raise UnsupportedModelError("a SwiftKV layer runs inside its decoder only")

    def attend_to(
        self, x: Tensor, kv: Tensor, batch: Batch, table: Tensor | None, k_norm: Tensor | None
    ) -> Tensor:
        """Normed x [T, D], kv [T, 2G * C] before rotation -> attention output [T, H * C]."""
        qkv = torch.cat([self.q_swiftkv(x), kv], dim=-1)
        q_norm = self.q_norm.weight if self.q_norm is not None else None
        options = (table, q_norm, k_norm, self.eps, self.has_unit_offset)
        rotated = ops.rope(qkv, batch.positions, *options, *self.heads)
        return self.attend(rotated, batch.query_starts)


class SwiftKVDecoder(Decoder):
    """The student: a decoder whose layers from k on read keys and values of x_k."""

    def __init__(
        self,
        config: ModelConfig,
        swift: SwiftKVConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        rope_device: torch.device | str | None = None,
    ) -> None:
        swift.check(config)
        super().__init__(config, dtype, device, rope_device)
        device = torch.device(device)
        self.swift = swift
        self.owners = owners(config, swift)
        self.norm_swiftkv = new_norm(config, dtype, device)
        for i, owner in self.owners.items():
            self.block(i).attn = SwiftAttention(config, i, owner, dtype, device)

    def block(self, layer_idx: int) -> Block:
        """The block of a layer."""
        found = self.layers[layer_idx]
        assert isinstance(found, Block)
        return found

    def attention(self, layer_idx: int) -> SwiftAttention:
        """The attention of a layer from k on."""
        found = self.block(layer_idx).attn
        assert isinstance(found, SwiftAttention)
        return found

    def first(self, batch: Batch) -> Tensor:
        """x_k [T, D]: what the first k layers, which the original model shares, make of a batch."""
        h = self.embedded(batch)
        for i in range(self.swift.num_key_value_layers):
            h = self.layers[i](h, batch, self.rope_of(i), None)
        return h

    def later(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """x_k [T, D] -> (output of layer L - 2 [T, D], output of the last one [T or R, D])."""
        s, h, last = self.norm_swiftkv(x), x, len(self.layers) - 1
        before, kv, k_norm = x, x, None
        for i in self.owners:
            block, attn = self.block(i), self.attention(i)
            if attn.kv_swiftkv is not None:
                kv = attn.kv_swiftkv(s)
                k_norm = attn.k_norm.weight if attn.k_norm is not None else None
            before = h
            o = attn.attend_to(block.attn_norm(h), kv, batch, self.rope_of(i), k_norm)
            if i == last and batch.output_rows is not None:
                h, o = (ops.select_rows(rows, batch.output_rows) for rows in (h, o))
            h = block.finish(h, o)
        return before, h

    def _walk(self, h: Tensor, batch: Batch) -> Tensor:
        if batch.kv is not None:
            raise UnsupportedModelError(
                "SwiftKV models are trained and evaluated by this version; it does not serve them"
            )
        for i in range(self.swift.num_key_value_layers):
            h = self.layers[i](h, batch, self.rope_of(i), None)
        return self.later(h, batch)[1]


def swiftkv_names(names: Names) -> Names:
    """The family's checkpoint names with those of SwiftKV's own tensors."""
    q, *_ = names["layers.{i}.attn.qkv"]
    prefix = q.rpartition(".")[0]  # ...layers.{i}.self_attn
    model = names["norm"][0].rpartition(".")[0]
    return {
        **names,
        "norm_swiftkv": (f"{model}.norm_swiftkv",),
        "layers.{i}.attn.q_swiftkv": (f"{prefix}.q_proj_swiftkv",),
        "layers.{i}.attn.kv_swiftkv": tuple(f"{prefix}.{p}_proj_swiftkv" for p in "kv"),
    }


def swiftkv_hf_config(decoder: SwiftKVDecoder) -> dict[str, Any]:
    """The config.json of a student; see the top of this file."""
    family = decoder.config.family
    return {
        **hf_config(decoder),
        "architectures": [family.architecture.removesuffix(_END) + _MARK + _END],
        "model_type": f"{family.model_type}_{SECTION}",
        SECTION: {
            "version": VERSION,
            "num_key_value_layers": decoder.swift.num_key_value_layers,
            "key_value_group_size": decoder.swift.key_value_group_size,
            "architecture": family.architecture,
            "model_type": family.model_type,
        },
    }


def load_swiftkv(
    folder: Path, dtype: DTypeName = "bfloat16", device: torch.device | str = "cpu"
) -> SwiftKVDecoder:
    """The student of a folder. ModelFileError for one that is not SwiftKV's, or is damaged."""
    load_kernels()
    values = _read(folder / "config.json")
    section = values.pop(SECTION)
    base = {
        **values,
        "architectures": [section["architecture"]],
        "model_type": section["model_type"],
    }
    config = parse_config(base, str(folder / "config.json"))
    source = SafetensorsSource(folder)
    if not source.has("lm_head.weight"):
        config = replace(config, tie_word_embeddings=True)
    swift = SwiftKVConfig(section["num_key_value_layers"], section["key_value_group_size"])
    decoder = SwiftKVDecoder(config, swift, DTYPES[dtype], "meta", rope_device=device)
    assign(decoder, source, swiftkv_names(config.family.hf_names), torch.device(device))
    return decoder


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: {error}; give the folder of a SwiftKV model") from error
    section: Mapping[str, Any] = values.get(SECTION) or {}
    if section.get("version") != VERSION:
        raise ModelFileError(
            f"{path}: no section {SECTION!r} of version {VERSION} (found {section or 'none'}); "
            "`sterna convert swiftkv` makes one of a model"
        )
    return values
