"""One function an op: checks its tensors, makes the output, hands addresses to the C++ kernel.

The same functions serve two sinks. An eager sink allocates with PyTorch and runs at once; a
recording sink (`tape.py`) allocates from an arena and appends the call to a tape. So what is
replayed is what was written, op by op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sterna.core.errors import KernelError

ACTIVATIONS = {"none": 0, "silu": 1, "gelu_tanh": 2, "relu": 3, "gelu": 4, "tanh": 5}
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
CACHE_FORMATS = {torch.int8: 1, torch.float8_e4m3fn: 2}  # others: the compute dtype, 0


class Sink(Protocol):
    """Where calls go. `kernels` is the C++ `Kernels`, `tape` its `Tape` or None (run now)."""

    kernels: Any
    tape: Any

    def kind(self, x: Tensor) -> int:
        """0 when the rows of `x` are tokens, 1 when they are output rows."""
        ...

    def empty(self, rows: int, cols: int, dtype: torch.dtype, kind: int) -> Tensor:
        """A contiguous [rows, cols] output."""
        ...

    def counts(self, rows: int, seqs: int) -> tuple[int, int, int]:
        """The step's (tokens, output rows, sequences) of an eager call; 0 when recording."""
        ...


Call = Callable[..., Tensor | None]


def embed(
    sink: Sink, tokens: Tensor, table: Tensor, hidden_size: int, scale: float = 1.0
) -> Tensor:
    kind = sink.kind(tokens)
    out = sink.empty(tokens.shape[0], hidden_size, table.dtype, kind)
    vocab = table.shape[0] * (table.shape[2] if table.dim() == 4 else 1)
    sink.kernels.embed(
        sink.tape, *sink.counts(tokens.shape[0], 0), tokens.data_ptr(), table.data_ptr(),
        out.data_ptr(), kind, DTYPES[table.dtype], int(table.dim() == 4), hidden_size, vocab, scale,
    )  # fmt: skip
    return out


def rms_norm(
    sink: Sink, x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False
) -> Tensor:
    return _norm(sink, x, weight, None, eps, unit_offset)


def layer_norm(sink: Sink, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return _norm(sink, x, weight, bias, eps, False, is_layer_norm=True)


def _norm(
    sink: Sink,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    unit_offset: bool,
    is_layer_norm: bool = False,
) -> Tensor:
    rows, hidden = x.shape
    kind = sink.kind(x)
    out = sink.empty(rows, hidden, x.dtype, kind)
    sink.kernels.norm(
        sink.tape, *sink.counts(rows, 0), x.data_ptr(), weight.data_ptr(), address(bias),
        out.data_ptr(), kind, DTYPES[x.dtype], hidden, int(unit_offset), int(is_layer_norm), eps,
    )  # fmt: skip
    return out


def linear(
    sink: Sink,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    act = ACTIVATIONS[activation]
    return _linear(sink, x, weight, out_features, bias=bias, residual=residual, act=act)


def gated_linear(
    sink: Sink,
    x: Tensor,
    weight: Tensor,
    activation: str,
    out_features: int,
    pre: Tensor | None = None,
) -> Tensor:
    """`pre` [T, 2 I]: takes the two sums of every output, rounded."""
    return _linear(sink, x, weight, out_features, gate=ACTIVATIONS[activation], pre=pre)


def logits(
    sink: Sink, x: Tensor, weight: Tensor, vocab_size: int, softcap: float = 0.0, scale: float = 1.0
) -> Tensor:
    return _linear(
        sink, x, weight, vocab_size, out_dtype=torch.float32, softcap=softcap, scale=scale
    )


def _linear(
    sink: Sink,
    x: Tensor,
    weight: Tensor,
    out_features: int,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: int = 0,
    act: int = 0,
    out_dtype: torch.dtype | None = None,
    softcap: float = 0.0,
    scale: float = 1.0,
    pre: Tensor | None = None,
) -> Tensor:
    rows, in_features = x.shape
    kind = sink.kind(x)
    out = sink.empty(rows, out_features, out_dtype or x.dtype, kind)
    sink.kernels.linear(
        sink.tape, *sink.counts(rows, 0), x.data_ptr(), weight.data_ptr(), address(bias),
        address(residual), out.data_ptr(), kind, DTYPES[x.dtype], int(weight.dim() == 4),
        in_features, out_features, gate, act, int(out_dtype is not None), softcap, scale,
        address(pre),
    )  # fmt: skip
    return out


def activate(sink: Sink, x: Tensor, kind: str) -> Tensor:
    return _elementwise(sink, x, None, ACTIVATIONS[kind])


def add(sink: Sink, x: Tensor, y: Tensor) -> Tensor:
    return _elementwise(sink, x, y, 0)


def _elementwise(sink: Sink, x: Tensor, y: Tensor | None, act: int) -> Tensor:
    rows, hidden = x.shape
    kind = sink.kind(x)
    out = sink.empty(rows, hidden, x.dtype, kind)
    sink.kernels.activate(
        sink.tape, *sink.counts(rows, 0), x.data_ptr(), address(y), out.data_ptr(), kind,
        DTYPES[x.dtype], hidden, act,
    )  # fmt: skip
    return out


def select_rows(sink: Sink, x: Tensor, rows: Tensor) -> Tensor:
    out = sink.empty(rows.shape[0], x.shape[1], x.dtype, 1)
    sink.kernels.select(
        sink.tape, *sink.counts(rows.shape[0], 0), x.data_ptr(), rows.data_ptr(), out.data_ptr(),
        DTYPES[x.dtype], x.shape[1],
    )  # fmt: skip
    return out


def rope(
    sink: Sink,
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
    cache: Tensor | None = None,
    slots: Tensor | None = None,
    block_size: int = 0,
) -> Tensor:
    """Serves `rope` and, with a cache, `rope_store`."""
    heads = (num_heads, num_kv_heads, head_dim)
    paged = (cache, slots, block_size)
    return _rope(sink, qkv, positions, None, table, q_norm, k_norm, eps, unit_offset, heads, paged)


def rope_queries(
    sink: Sink,
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
    heads = (num_heads, 0, head_dim)
    paged = (None, None, 0)
    return _rope(sink, q, positions, rows, table, q_norm, None, eps, unit_offset, heads, paged)


def _rope(
    sink: Sink,
    qkv: Tensor,
    positions: Tensor,
    row_ids: Tensor | None,
    table: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    unit_offset: bool,
    heads: tuple[int, int, int],
    paged: tuple[Tensor | None, Tensor | None, int],
) -> Tensor:
    (num_heads, num_kv_heads, head_dim), (cache, slots, block_size) = heads, paged
    rows, kind = qkv.shape[0], sink.kind(qkv)
    written = num_heads if cache is not None else num_heads + 2 * num_kv_heads
    out = sink.empty(rows, written * head_dim, qkv.dtype, kind)
    sink.kernels.rope(
        sink.tape, *sink.counts(rows, 0), qkv.data_ptr(), positions.data_ptr(), address(row_ids),
        address(table), address(q_norm), address(k_norm), out.data_ptr(), address(cache),
        address(slots), kind, DTYPES[qkv.dtype], *heads, _rotary_dim(table), int(unit_offset),
        block_size, 0 if cache is None else cache_format(cache, qkv.dtype), eps,
    )  # fmt: skip
    return out


def store_kv(
    sink: Sink,
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
    sink.kernels.store(
        sink.tape, *sink.counts(kv.shape[0], 0), kv.data_ptr(), positions.data_ptr(),
        slots.data_ptr(), [address(table) for table in tables],
        [_rotary_dim(table) for table in tables], [address(norm) for norm in k_norms],
        [cache.data_ptr() for cache in caches], sink.kind(kv), DTYPES[kv.dtype], num_kv_heads,
        head_dim, int(unit_offset), block_size, cache_format(caches[0], kv.dtype), eps,
    )  # fmt: skip


def _rotary_dim(table: Tensor | None) -> int:
    return 0 if table is None else table.shape[1]


def paged_attention(
    sink: Sink,
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
    """`q` rows may be wider than num_heads * head_dim: the query heads come first."""
    (rows, stride), kind = q.shape, sink.kind(q)
    out = sink.empty(rows, num_heads * head_dim, q.dtype, kind)
    sink.kernels.attention(
        sink.tape, *sink.counts(rows, context_lens.shape[0]), q.data_ptr(), cache.data_ptr(),
        block_tables.data_ptr(), query_starts.data_ptr(), context_lens.data_ptr(), out.data_ptr(),
        kind, DTYPES[q.dtype], num_heads, num_kv_heads, head_dim, block_size, block_tables.shape[1],
        stride, window, cache_format(cache, q.dtype), scale, softcap,
    )  # fmt: skip
    return out


def cache_format(cache: Tensor, dtype: torch.dtype) -> int:
    """CacheFormat of kernels/cpu/args.h. KernelError for a plain cache of another dtype."""
    if cache.dtype != dtype and cache.dtype not in CACHE_FORMATS:
        raise KernelError(
            f"a KV cache of {cache.dtype} under a model of {dtype}; use {dtype}, int8 or e4m3"
        )
    return CACHE_FORMATS.get(cache.dtype, 0)


def address(x: Tensor | None) -> int:
    """The tensor's address, 0 for None."""
    return 0 if x is None else x.data_ptr()


CALLS: dict[str, Call] = {
    "embed": embed,
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "linear": linear,
    "gated_linear": gated_linear,
    "activate": activate,
    "add": add,
    "select_rows": select_rows,
    "logits": logits,
    "rope": rope,
    "rope_store": rope,
    "rope_queries": rope_queries,
    "store_kv": store_kv,
    "paged_attention": paged_attention,
}
