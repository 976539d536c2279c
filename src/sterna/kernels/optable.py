"""The ops as data: schema, reference, tolerance, and whether there is a backward.

`define()` puts them in PyTorch's dispatcher under the namespace `sterna`: the reference as
CompositeExplicitAutograd (it serves CPU, CUDA and fake tensors), the backward of `autograd.py`
under Autograd. Tests and `sterna doctor` walk `OPS`.

Tolerances are relative to the largest magnitude of the exact result. float32: 2^-23 times a few
hundred for sums in another order. bfloat16 and float16: one rounding of the output (2^-9, 2^-12)
doubled, since an op and its oracle may round to neighbouring values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sterna.kernels import autograd, lora_reference, quant_reference, reference

_TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float32: 5e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
)

_HEADS = "int num_heads, int num_kv_heads, int head_dim"
_ROPE = (
    "Tensor qkv, Tensor positions, Tensor? table, Tensor? q_norm, Tensor? k_norm, "
    f"float eps, bool unit_offset, {_HEADS}"
)
_LORA = "Tensor? slots, Tensor[] a, Tensor[] b, Tensor scales, Tensor ranks"
_QUANT = "Tensor tiles, Tensor scales, Tensor table, Tensor? row_formats, int bits, int group_size"


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One row of the op table. `schema` is the argument list in PyTorch's schema language, and
    `returns` what stands behind its arrow.
    """

    name: str
    schema: str
    reference: Callable[..., Tensor | None]
    inference_only: bool = False
    returns: str = "Tensor"
    tolerance: Mapping[torch.dtype, float] = field(default_factory=lambda: _TOLERANCE)


OPS: tuple[OpSpec, ...] = (
    OpSpec(
        "embed",
        "Tensor tokens, Tensor table, int hidden_size, float scale=1.0",
        reference.embed,
    ),
    OpSpec(
        "rms_norm",
        "Tensor x, Tensor weight, float eps, bool unit_offset=False",
        reference.rms_norm,
    ),
    OpSpec(
        "layer_norm",
        "Tensor x, Tensor weight, Tensor? bias, float eps",
        reference.layer_norm,
    ),
    OpSpec(
        "embed_norm",
        "Tensor tokens, Tensor table, Tensor positions, Tensor? position_table, Tensor weight, "
        "Tensor? bias, float eps",
        reference.embed_norm,
    ),
    OpSpec(
        "linear",
        "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int out_features, "
        "str activation='none'",
        reference.linear,
    ),
    OpSpec(
        "gated_linear",
        "Tensor x, Tensor weight, str activation, int out_features",
        reference.gated_linear,
    ),
    OpSpec(
        "quant_embed",
        f"Tensor tokens, {_QUANT}, int hidden_size, float scale, ScalarType dtype",
        quant_reference.quant_embed,
    ),
    OpSpec(
        "quant_linear",
        f"Tensor x, {_QUANT}, int in_features, Tensor? bias, Tensor? residual, int out_features, "
        "bool int8_activations=False, str activation='none'",
        quant_reference.quant_linear,
    ),
    OpSpec(
        "quant_gated_linear",
        f"Tensor x, {_QUANT}, int in_features, str activation, int out_features, "
        "bool int8_activations=False",
        quant_reference.quant_gated_linear,
    ),
    OpSpec(
        "quant_logits",
        f"Tensor x, {_QUANT}, int in_features, int vocab_size, float softcap=0.0, "
        "float scale=1.0, bool int8_activations=False",
        quant_reference.quant_logits,
    ),
    OpSpec("activate", "Tensor x, str kind", reference.activate),
    OpSpec("add", "Tensor x, Tensor y", reference.add),
    OpSpec("select_rows", "Tensor x, Tensor rows", reference.select_rows),
    OpSpec(
        "logits",
        "Tensor x, Tensor weight, int vocab_size, float softcap=0.0, float scale=1.0",
        reference.logits,
    ),
    OpSpec("rope", _ROPE, reference.rope),
    OpSpec(
        "attention",
        f"Tensor qkv, Tensor query_starts, {_HEADS}, float scale, int window=0, float softcap=0.0",
        reference.attention,
    ),
    OpSpec(
        "shared_attention",
        "Tensor qkv, Tensor query_starts, Tensor key_rows, Tensor key_starts, "
        f"{_HEADS}, float scale, int window=0, float softcap=0.0",
        reference.shared_attention,
    ),
    OpSpec(
        "bidirectional_attention",
        f"Tensor qkv, Tensor query_starts, {_HEADS}, float scale, int window=0",
        reference.bidirectional_attention,
    ),
    OpSpec(
        "pool",
        "Tensor x, Tensor query_starts, str kind, bool normalize=False",
        reference.pool,
        inference_only=True,
    ),
    OpSpec(
        "rope_store",
        f"{_ROPE}, Tensor(a!) cache, Tensor slots, int block_size",
        reference.rope_store,
        inference_only=True,
    ),
    OpSpec(
        "rope_queries",
        "Tensor q, Tensor positions, Tensor? rows, Tensor? table, Tensor? q_norm, float eps, "
        "bool unit_offset, int num_heads, int head_dim",
        reference.rope_queries,
        inference_only=True,
    ),
    OpSpec(
        "store_kv",
        "Tensor kv, Tensor positions, Tensor?[] tables, Tensor?[] k_norms, float eps, "
        "bool unit_offset, int num_kv_heads, int head_dim, Tensor(a!)[] caches, Tensor slots, "
        "int block_size",
        reference.store_kv,
        inference_only=True,
        returns="()",
    ),
    OpSpec(
        "paged_attention",
        "Tensor q, Tensor cache, Tensor block_tables, Tensor query_starts, Tensor context_lens, "
        f"{_HEADS}, int block_size, float scale, int window=0, float softcap=0.0",
        reference.paged_attention,
        inference_only=True,
    ),
    OpSpec(
        "draft_cell",
        "Tensor z, Tensor? cell, Tensor norm, Tensor norm_bias, Tensor? cell_norm, "
        "Tensor? cell_norm_bias, float eps",
        reference.draft_cell,
        inference_only=True,
    ),
    OpSpec(
        "lora",
        f"Tensor x, Tensor(a!) y, {_LORA}, int[] starts",
        lora_reference.lora,
        inference_only=True,
        returns="()",
    ),
    OpSpec(
        "lora_gated",
        f"Tensor x, Tensor product, {_LORA}, str activation, int out_features",
        lora_reference.lora_gated,
        inference_only=True,
    ),
    OpSpec("pick", "Tensor logits, Tensor? ids", reference.pick, inference_only=True),
)


@cache
def library() -> Any:
    """The `sterna` torch.library.Library, defined once; back ends add kernels by `.impl`."""
    make: Callable[..., Any] = torch.library.Library
    lib = make("sterna", "DEF")
    for op in OPS:
        backward = autograd.autograd_kernel(op.name, op.reference, op.inference_only)
        lib.define(f"{op.name}({op.schema}) -> {op.returns}")
        lib.impl(op.name, op.reference, "CompositeExplicitAutograd")
        lib.impl(op.name, backward, "Autograd")
    return lib


def define() -> Any:
    """`torch.ops.sterna` with every op defined."""
    library()
    return torch.ops.sterna
