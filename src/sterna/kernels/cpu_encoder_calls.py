"""The ops of encoders on the C++ kernels; see `cpu_calls.py` for sinks.

Sequences are found by `query_starts` alone: no cache, no block tables, no padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sterna.kernels.cpu_calls import DTYPES, Call, Sink, address

POOLINGS = {"mean": 0, "cls": 1, "last": 2}


def embed_norm(
    sink: Sink,
    tokens: Tensor,
    table: Tensor,
    positions: Tensor,
    position_table: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    rows, hidden = tokens.shape[0], table.shape[1]
    out = sink.empty(rows, hidden, table.dtype, 0)
    num_positions = 0 if position_table is None else position_table.shape[0]
    sink.kernels.embed_norm(
        sink.tape, *sink.counts(rows, 0), tokens.data_ptr(), table.data_ptr(),
        positions.data_ptr(), address(position_table), weight.data_ptr(), address(bias),
        out.data_ptr(), DTYPES[table.dtype], hidden, num_positions, eps,
    )  # fmt: skip
    return out


def bidirectional_attention(
    sink: Sink,
    qkv: Tensor,
    query_starts: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
) -> Tensor:
    tokens = qkv.shape[0]
    out = sink.empty(tokens, num_heads * head_dim, qkv.dtype, 0)
    sink.kernels.bidirectional(
        sink.tape, *sink.counts(tokens, len(query_starts) - 1), qkv.data_ptr(),
        query_starts.data_ptr(), out.data_ptr(), DTYPES[qkv.dtype], num_heads, num_kv_heads,
        head_dim, window, scale,
    )  # fmt: skip
    return out


def pool(sink: Sink, x: Tensor, query_starts: Tensor, kind: str, normalize: bool = False) -> Tensor:
    seqs = len(query_starts) - 1
    out = sink.empty(seqs, x.shape[1], torch.float32, 1)
    sink.kernels.pool(
        sink.tape, *sink.counts(x.shape[0], seqs), x.data_ptr(), query_starts.data_ptr(),
        out.data_ptr(), DTYPES[x.dtype], x.shape[1], POOLINGS[kind], int(normalize),
    )  # fmt: skip
    return out


ENCODER_CALLS: dict[str, Call] = {
    "embed_norm": embed_norm,
    "bidirectional_attention": bidirectional_attention,
    "pool": pool,
}
