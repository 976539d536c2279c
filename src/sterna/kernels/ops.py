"""The op table: one contract an op, whatever back end runs it.

Legend: T tokens, R output rows, D hidden_size, K in_features, N out_features, H query heads,
G key/value heads, C head_dim, V vocabulary, S sequences, B block-table width.

Every op takes and returns contiguous tensors of the compute dtype (float32 or bfloat16; float16
on CUDA) unless said otherwise, accumulates in float32 and rounds once, at its output. The value of
an output row never depends on the other rows of the call (batch-invariant).

The `quant_*` ops are the same ops on a quantised weight, given flat (`QuantWeight.flat()` of
`quant_weight.py`): tiles of codes, scales, table of code values, row formats, bits, group size,
in_features. Their activations are exact: codes are decoded, activations are never rounded. With
`int8_activations` (opt-in; every format but fp8) each row of x is rounded to round(x * 127 / m) *
m / 127, m its largest magnitude, and the sums of a scale group are exact integers.

Weights of `linear`, `gated_linear`, `logits` and `embed` come plain ([N, K], the Hugging Face
layout) or packed by `pack_weight` (4-D, layout owned by the back end). Both give the same bits.

The functions below are thin: each calls its `sterna::NAME` in PyTorch's dispatcher, where the
reference serves every device and a back end's kernel overrides it for its own (see `load.py`).
Index tensors are int32 but for `slots` (int64). The road not taken: `torch.library.custom_op`,
which adds about 20 us a call; a Library with explicit keys adds 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sterna.kernels import optable
from sterna.kernels.backend import backend_for

_Op = Callable[..., Tensor]
_sterna = optable.define()

_embed: _Op = _sterna.embed.default
_rms_norm: _Op = _sterna.rms_norm.default
_layer_norm: _Op = _sterna.layer_norm.default
_linear: _Op = _sterna.linear.default
_embed_norm: _Op = _sterna.embed_norm.default
_bidirectional_attention: _Op = _sterna.bidirectional_attention.default
_pool: _Op = _sterna.pool.default
_gated_linear: _Op = _sterna.gated_linear.default
_activate: _Op = _sterna.activate.default
_add: _Op = _sterna.add.default
_select_rows: _Op = _sterna.select_rows.default
_logits: _Op = _sterna.logits.default
_quant_embed: _Op = _sterna.quant_embed.default
_quant_linear: _Op = _sterna.quant_linear.default
_quant_gated_linear: _Op = _sterna.quant_gated_linear.default
_quant_logits: _Op = _sterna.quant_logits.default
_rope: _Op = _sterna.rope.default
_attention: _Op = _sterna.attention.default
_rope_store: _Op = _sterna.rope_store.default
_rope_queries: _Op = _sterna.rope_queries.default
_store_kv: Callable[..., None] = _sterna.store_kv.default
_shared_attention: _Op = _sterna.shared_attention.default
_paged_attention: _Op = _sterna.paged_attention.default
_draft_cell: _Op = _sterna.draft_cell.default
_pick: _Op = _sterna.pick.default


def embed(tokens: Tensor, table: Tensor, hidden_size: int, scale: float = 1.0) -> Tensor:
    """tokens [T] int32, table [V, D] -> [T, D]: rows times `scale`, rounded once.

    `scale` is used as given; a model that rounds it to its dtype (Gemma) does so before.
    """
    return _embed(tokens, table, hidden_size, scale)


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """x [T, D], weight [D] -> [T, D]: x / sqrt(mean(x^2) + eps) * weight.

    `unit_offset` uses weight + 1 (Gemma).
    """
    return _rms_norm(x, weight, eps, unit_offset)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x [T, D], weight and bias [D] -> [T, D]."""
    return _layer_norm(x, weight, bias, eps)


def embed_norm(
    tokens: Tensor,
    table: Tensor,
    positions: Tensor,
    position_table: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """An encoder's first hidden states: tokens [T], positions [T] int32, table [V, D] -> [T, D].

    layer_norm(table[token] + position_table[position]), rounded once. position_table: float32
    [P, D]; [1, D] is added to every token, whatever its position; None adds nothing.
    """
    return _embed_norm(tokens, table, positions, position_table, weight, bias, eps)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """x [T, K], weight [N, K], bias [N], residual [T, N] -> [T, N].

    activation(x W^T + bias) + residual in float32, before the single rounding. `activation` is
    "none" or one of `activate`.
    """
    return _linear(x, weight, bias, residual, out_features, activation)


def gated_linear(x: Tensor, weight: Tensor, activation: str, out_features: int) -> Tensor:
    """x [T, K], weight [2I, K] (gate rows, then up rows) -> [T, I]: act(gate) * up.

    `activation` is "silu", "gelu_tanh" or "gelu"; `out_features` is I. One rounding.
    """
    return _gated_linear(x, weight, activation, out_features)


def activate(x: Tensor, kind: str) -> Tensor:
    """Elementwise "relu", "gelu" (erf), "gelu_tanh", "silu" or "tanh"; same shape."""
    return _activate(x, kind)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y of one shape."""
    return _add(x, y)


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [T, D], rows [R] int32 -> [R, D]."""
    return _select_rows(x, rows)


def logits(
    x: Tensor, weight: Tensor, vocab_size: int, softcap: float = 0.0, scale: float = 1.0
) -> Tensor:
    """x [R, D], weight [V, D] -> float32 [R, V]: l = x @ weight.T * scale.

    With `softcap` c > 0 the result is c * tanh(l / c).
    """
    return _logits(x, weight, vocab_size, softcap, scale)


def quant_embed(
    tokens: Tensor,
    tiles: Tensor,
    scales: Tensor,
    table: Tensor,
    row_formats: Tensor | None,
    bits: int,
    group_size: int,
    hidden_size: int,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """tokens [T] int32 -> [T, D] in `dtype`: value of each code * its scale * `scale`.

    Two products in float32, in that order, then one rounding.
    """
    weight = (tiles, scales, table, row_formats, bits, group_size, hidden_size)
    return _quant_embed(tokens, *weight, scale, dtype)


def quant_linear(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    table: Tensor,
    row_formats: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    int8_activations: bool = False,
    activation: str = "none",
) -> Tensor:
    """x [T, K], weight [N, K] quantised -> [T, N] as `linear`."""
    weight = (tiles, scales, table, row_formats, bits, group_size, in_features)
    return _quant_linear(x, *weight, bias, residual, out_features, int8_activations, activation)


def quant_gated_linear(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    table: Tensor,
    row_formats: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    activation: str,
    out_features: int,
    int8_activations: bool = False,
) -> Tensor:
    """x [T, K], gated weight -> [T, I] as `gated_linear`.

    The row blocks of gate come first, then those of up; each half is padded by itself.
    """
    weight = (tiles, scales, table, row_formats, bits, group_size, in_features)
    return _quant_gated_linear(x, *weight, activation, out_features, int8_activations)


def quant_logits(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    table: Tensor,
    row_formats: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    vocab_size: int,
    softcap: float = 0.0,
    scale: float = 1.0,
    int8_activations: bool = False,
) -> Tensor:
    """x [R, D], weight [V, D] quantised -> float32 [R, V] as `logits`."""
    weight = (tiles, scales, table, row_formats, bits, group_size, in_features)
    return _quant_logits(x, *weight, vocab_size, softcap, scale, int8_activations)


def rope(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    unit_offset: bool,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> Tensor:
    """qkv [T, (H + 2G) * C], positions [T] int32 -> same shape, queries and keys rotated.

    table: float32 [P, rotary_dim], row p = [cos(rotary_dim / 2) | sin(rotary_dim / 2)] with any
    attention scaling multiplied in; None = no rotation (NoPE layers). Half-split rotation of the
    first rotary_dim dims of each query and key head. q_norm, k_norm [C]: RMS norm of each head
    before the rotation (Qwen3, Gemma 3), with `eps` and `unit_offset` as in `rms_norm`.
    """
    heads = (num_heads, num_kv_heads, head_dim)
    return _rope(qkv, positions, table, q_norm, k_norm, eps, unit_offset, *heads)


def attention(
    qkv: Tensor,
    query_starts: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """qkv [T, (H + 2G) * C] after `rope`, query_starts [S + 1] int32 -> [T, H * C].

    Causal, each sequence over its own tokens. window w > 0: key j is visible to query i iff
    i - w < j <= i. softcap c > 0: scores become c * tanh(score / c) before the softmax.
    """
    return _attention(qkv, query_starts, num_heads, num_kv_heads, head_dim, scale, window, softcap)


def shared_attention(
    qkv: Tensor,
    query_starts: Tensor,
    key_rows: Tensor,
    key_starts: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """qkv [T, (H + 2G) * C] after `rope`, key_rows [K] int32 -> [T, H * C].

    As `attention`, but sequence s sees the rows key_rows[key_starts[s] : key_starts[s + 1]], of
    which the last are its own: a prefix that many continue is computed once. A row has the bits
    that `attention` gives it where every sequence has a prefix of its own.
    """
    heads = (num_heads, num_kv_heads, head_dim)
    keys = (key_rows, key_starts)
    return _shared_attention(qkv, query_starts, *keys, *heads, scale, window, softcap)


def bidirectional_attention(
    qkv: Tensor,
    query_starts: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
) -> Tensor:
    """qkv [T, (H + 2G) * C], query_starts [S + 1] int32 -> [T, H * C].

    Every token of a sequence sees every other; with window w > 0, key j is visible to query i iff
    |i - j| <= w.
    """
    heads = (num_heads, num_kv_heads, head_dim)
    return _bidirectional_attention(qkv, query_starts, *heads, scale, window)


def pool(x: Tensor, query_starts: Tensor, kind: str, normalize: bool = False) -> Tensor:
    """x [T, D], query_starts [S + 1] int32 -> float32 [S, D], one row a sequence.

    kind: "mean" of its rows, "cls" (the first) or "last". `normalize` divides by the Euclidean
    length, at least 1e-12. Inference only.
    """
    return _pool(x, query_starts, kind, normalize)


def rope_store(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    unit_offset: bool,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cache: Tensor,
    slots: Tensor,
    block_size: int,
) -> Tensor:
    """`rope`, then keys and values into `cache` at `slots` [T] int64 -> queries [T, H * C].

    Inference only: it writes into the cache (block slot // block_size, row slot % block_size).
    """
    rope_args = (positions, table, q_norm, k_norm, eps, unit_offset)
    heads = (num_heads, num_kv_heads, head_dim)
    return _rope_store(qkv, *rope_args, *heads, cache, slots, block_size)


def rope_queries(
    q: Tensor,
    positions: Tensor,
    rows: Tensor | None,
    table: Tensor | None,
    q_norm: Tensor | None,
    eps: float,
    unit_offset: bool,
    num_heads: int,
    head_dim: int,
) -> Tensor:
    """q [R, H * C], positions [T] int32, rows [R] int32 -> same shape: `rope` of queries alone.

    Row i is token rows[i], at positions[rows[i]]; None = all tokens. Inference only.
    """
    return _rope_queries(q, positions, rows, table, q_norm, eps, unit_offset, num_heads, head_dim)


def store_kv(
    kv: Tensor,
    positions: Tensor,
    tables: Sequence[Tensor | None],
    k_norms: Sequence[Tensor | None],
    eps: float,
    unit_offset: bool,
    num_kv_heads: int,
    head_dim: int,
    caches: Sequence[Tensor],
    slots: Tensor,
    block_size: int,
) -> None:
    """Keys and values of n layers into n caches at `slots` [T] int64, as `rope_store` does one.

    kv [T, n * 2G * C]: of each layer its keys before rotation, then its values. tables and k_norms
    are those of the layers. Inference only.
    """
    _store_kv(
        kv,
        positions,
        tables,
        k_norms,
        eps,
        unit_offset,
        num_kv_heads,
        head_dim,
        caches,
        slots,
        block_size,
    )


def paged_attention(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """q [T, H * C] from `rope_store`, or [R, H * C] -> the same shape; inference only.

    block_tables [S, B] int32, query_starts [S + 1] int32 in rows of q, context_lens [S] int32. The
    queries of a sequence are the last of its context_len tokens, or none. window and softcap as in
    `attention`.
    """
    return _paged_attention(
        q,
        cache,
        block_tables,
        query_starts,
        context_lens,
        num_heads,
        num_kv_heads,
        head_dim,
        block_size,
        scale,
        window,
        softcap,
    )


def draft_cell(
    z: Tensor,
    cell: Tensor | None,
    norm: Tensor,
    norm_bias: Tensor,
    cell_norm: Tensor | None,
    cell_norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """One draft's state from its pre-activations (model/speculator.py); inference only.

    mlp (no `cell_norm`): z [T, d] -> gelu(N(z)) [T, d], N(x) = x / sqrt(mean(x^2) + eps) * norm +
    norm_bias. lstm: z [T, 4d] = f, i, o, fresh and the cell of the draft before [T, d], or None ->
    [2T, d]: states, then cells: c = cell * sigmoid(f) + gelu(N_cell(fresh)) * sigmoid(i),
    gelu(N(c)) * sigmoid(o). All in float32, rounded once at the outputs. gelu is erf's.
    """
    return _draft_cell(z, cell, norm, norm_bias, cell_norm, cell_norm_bias, eps)


def pick(logits: Tensor, ids: Tensor | None) -> Tensor:
    """float32 logits [T, V], ids [V] int32 -> int32 [2, T]; inference only.

    Row 0: the token of the largest logit (the first of equals), ids[argmax]. Row 1: its softmax
    probability as float32 bits (`.view(torch.float32)`). A row with NaN or an infinite maximum
    gives the first token with probability 0.
    """
    return _pick(logits, ids)


def new_kv_cache(
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Zeros [num_blocks, 2, G * block_size * C]; the inner layout is owned by the back end.

    `dtype` is the compute dtype, or int8 or float8_e4m3fn for a quantised cache, whose rows hold
    C + 4 bytes: see kernels/kv_codes.py.
    """
    backend = backend_for(device.type)
    return backend.new_kv_cache(num_blocks, block_size, num_kv_heads, head_dim, dtype, device)


def pack_weight(weight: Tensor, gated: bool = False, out: Tensor | None = None) -> Tensor:
    """weight [N, K] -> the 4-D layout of the back end in use, or `weight` itself (reference).

    `gated`: the rows are [gate; up] for `gated_linear`. `out`: what an earlier call returned for a
    weight of this shape; it is filled and returned.
    """
    return backend_for(weight.device.type).pack_weight(weight, gated, out)
