"""The backward of packed causal attention, a tile of queries against all its keys at a time.

For the queries of a tile all keys they see are at hand, so their softmax needs no state saved by
the forward (FlashAttention-2, arXiv 2307.08691, saves the log-sums instead). Memory is O(T): a tile
of probabilities is at most TILE_BYTES. One document and one group of heads after the other, so no
index reaches 2^31.

Legend: n tokens of a document, g query heads a key head, b queries of a tile, j keys they see.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from sterna.kernels.backend import backend_for
from sterna.kernels.reference import own_keys, wide

TILE_ROWS = 128  # 1,024 tokens in bfloat16: 74 ms a layer; tiles of 256 and 512 rows 230 and 370
TILE_BYTES = 64 << 20


def attention(
    grad: Tensor,
    wants: tuple[bool, ...],
    qkv: Tensor,
    query_starts: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor | None, ...]:
    """grad [T, H * C] -> qkv's [T, (H + 2 G) * C]."""
    heads = (num_heads, num_kv_heads, head_dim)
    native = backend_for(qkv.device.type).attention_backward(
        grad, qkv, query_starts, heads, scale, window, softcap
    )
    if native is not None:
        return (native, *(None,) * 7)
    return (reference(grad, qkv, query_starts, heads, scale, window, softcap), *(None,) * 7)


def shared_attention(
    grad: Tensor,
    wants: tuple[bool, ...],
    qkv: Tensor,
    query_starts: Tensor,
    key_rows: Tensor,
    key_starts: Tensor,
    *options: Any,
) -> tuple[Tensor | None, ...]:
    """grad [T, H * C] -> qkv's: sequences apart, then the prefixes' shares summed in float32.

    A prefix has no upstream gradient as query of a sequence that only reads it: the kernel passes
    over tiles of zeros.
    """
    own = own_keys(query_starts, key_starts)
    rows = key_rows.long()
    upstream = grad.new_zeros(len(rows), grad.shape[1]).index_copy_(0, own, grad)
    (found, *_) = attention(upstream, wants, qkv.index_select(0, rows), key_starts, *options)
    assert found is not None, "attention always has a gradient"
    d_qkv = found.index_select(0, own)
    is_read = torch.ones(len(rows), dtype=torch.bool, device=rows.device).index_fill_(0, own, False)
    read = is_read.nonzero()[:, 0]
    if len(read):
        prefixes, places = torch.unique(rows[read], return_inverse=True)
        total = wide(d_qkv[prefixes]).index_add_(0, places, wide(found[read]))
        d_qkv.index_copy_(0, prefixes, total.to(d_qkv.dtype))
    return (d_qkv, *(None,) * 9)


def reference(
    grad: Tensor,
    qkv: Tensor,
    query_starts: Tensor,
    heads: tuple[int, int, int],
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """The gradient of qkv by PyTorch, which back ends without a kernel run."""
    d_qkv = torch.empty_like(qkv)
    for a, b in itertools.pairwise(query_starts.tolist()):
        _document(grad[a:b], qkv[a:b], d_qkv[a:b], heads, scale, window, softcap)
    return d_qkv


def _document(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    heads: tuple[int, int, int],
    scale: float,
    window: int,
    softcap: float,
) -> None:
    num_heads, num_kv_heads, dim = heads
    group = num_heads // num_kv_heads
    q, k, v = _heads(qkv, heads)
    d_q, d_k, d_v = _heads(out, heads)
    g = grad.view(len(grad), num_heads, dim).transpose(0, 1)
    for i in range(num_kv_heads):
        own = slice(i * group, (i + 1) * group)
        parts = (q[own].contiguous(), k[i].contiguous(), v[i].contiguous(), g[own].contiguous())
        d_q[own], d_k[i], d_v[i] = _group(*parts, scale, window, softcap)


def _heads(qkv: Tensor, heads: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """[n, (H + 2 G) * C] as views q [H, n, C], k [G, n, C], v [G, n, C]."""
    num_heads, num_kv_heads, dim = heads
    split = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, dim).transpose(0, 1)
    parts: tuple[Tensor, ...] = torch.split(split, [num_heads, num_kv_heads, num_kv_heads])
    return parts


def _group(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, g [g, n, C] of the heads that share k, v [n, C]; returns their gradients."""
    n = q.shape[1]
    d_q = torch.empty_like(q)
    d_k, d_v = torch.zeros_like(wide(k)), torch.zeros_like(wide(v))
    for a, b in _tiles(n, q.shape[0], wide(q[:0]).element_size()):
        first = max(0, a - window + 1) if window > 0 else 0
        keys, values = k[first:b], v[first:b]
        rows, d_rows = q[:, a:b].flatten(0, 1), g[:, a:b].flatten(0, 1)  # [g b, C]
        p, slope = _probabilities(rows, keys, b - a, scale, window, softcap)
        d_v[first:b] += p.to(q.dtype).t() @ d_rows
        d_p = wide(d_rows @ values.t())
        d_s = d_p.sub_((p * d_p).sum(1, keepdim=True)).mul_(p)
        d_s = (d_s if slope is None else d_s.mul_(slope)).mul_(scale).to(q.dtype)
        d_q[:, a:b] = (d_s @ keys).view(q.shape[0], b - a, -1)
        d_k[first:b] += d_s.t() @ rows
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype)


def _tiles(n: int, group: int, itemsize: int) -> Any:
    """(a, b) of the query tiles, each within TILE_ROWS and, against n keys, TILE_BYTES."""
    most = TILE_BYTES // max(1, group * n * itemsize)
    size = max(1, min(TILE_ROWS, most))
    return ((a, min(a + size, n)) for a in range(0, n, size))


def _probabilities(
    rows: Tensor, keys: Tensor, num_rows: int, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor | None]:
    """softmax [g b, j] of the last num_rows positions of the keys; with a softcap its slope too."""
    scores = (wide(rows) @ wide(keys).t()).mul_(scale)  # bfloat16 scores would move p by 2^-9 |s|
    slope = None
    if softcap > 0:
        scores.div_(softcap).tanh_()
        slope = 1.0 - scores.square()
        scores.mul_(softcap)
    j = torch.arange(len(keys), device=keys.device)
    i = torch.arange(len(keys) - num_rows, len(keys), device=keys.device)[:, None]
    hidden = j > i
    if window > 0:
        hidden |= j <= i - window
    scores.view(-1, num_rows, len(keys)).masked_fill_(hidden, float("-inf"))
    return scores.softmax(1), slope
