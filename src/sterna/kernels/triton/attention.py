"""Packed causal attention and its gradient in Triton: O(T) memory, one document never sees another.

FlashAttention-2 (arXiv 2307.08691) over the documents of a packed row. A tile is BLOCK rows of one
document; tiles are counted from the document's first row, so a row's sums never depend on the
documents beside it. Scores, sums and softmax are float32; products take the inputs' dtype.

    forward     a program a (query tile, query head): keys from the window's or document's begin on
    state       the same walk once more, for each row's log-sum-exp and sum(grad * out); nothing of
                the forward has to be kept, which checkpointed blocks could not keep anyway
    queries     a program a (query tile, query head): d_q
    keys        a program a (key tile, key head): d_k and d_v, looping over the query heads that
                share them, so there is no atomic addition and the result is the same every time

Rows are multiplied by their stride in 64 bits: qkv of 524,288 tokens has more than 2^31 numbers.

Bits: training and serving agree to the bit on the CPU only. On CUDA serving runs another kernel
(paged attention), and the two agree within the op's tolerance.

Not run on a GPU so far: block sizes are a guess. Tested with TRITON_INTERPRET=1.

Legend: T tokens, H query heads, G key/value heads, C head_dim, M and N rows of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sterna.kernels.triton import attention_kernels as kernels

Heads = tuple[int, int, int]  # num_heads, num_kv_heads, head_dim
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def forward(
    qkv: Tensor, query_starts: Tensor, heads: Heads, scale: float, window: int, softcap: float
) -> Tensor:
    """qkv [T, (H + 2 G) * C] -> [T, H * C]; as `ops.attention`, for DTYPES."""
    num_heads, _, dim = heads
    out = qkv.new_empty(len(qkv), num_heads * dim)
    tiles = _tiles(query_starts, block_rows(dim, qkv.element_size()))
    none = qkv.new_empty(0, dtype=torch.float32)
    values = (qkv, out, out, none, none, tiles, len(qkv))
    _launch(
        kernels.forward, tiles, num_heads, values, heads, scale, window, softcap, IS_STATE=False
    )
    return out


def backward(
    grad: Tensor,
    qkv: Tensor,
    query_starts: Tensor,
    heads: Heads,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """grad [T, H * C] -> the gradient of qkv."""
    num_heads, num_kv_heads, dim = heads
    d_qkv = torch.empty_like(qkv)
    tiles = _tiles(query_starts, block_rows(dim, qkv.element_size()))
    log_sums = torch.empty(num_heads, len(qkv), dtype=torch.float32, device=qkv.device)
    deltas = torch.empty_like(log_sums)
    state = (log_sums, deltas, tiles, len(qkv))
    rest: tuple[Any, ...] = (heads, scale, window, softcap)
    _launch(kernels.forward, tiles, num_heads, (qkv, grad, grad, *state), *rest, IS_STATE=True)
    _launch(kernels.queries, tiles, num_heads, (qkv, grad, d_qkv, *state), *rest)
    _launch(kernels.keys, tiles, num_kv_heads, (qkv, grad, d_qkv, *state), *rest)
    return d_qkv


def block_rows(dim: int, itemsize: int) -> int:
    """Rows of a tile: so many that a program's tiles fit into 99 KiB of shared memory."""
    most, widest = (64, 128) if itemsize == 2 else (32, 64)
    return most if dim <= widest else most // 2


def _tiles(query_starts: Tensor, block: int) -> Tensor:
    """[tiles, 3] int32: first row, document's begin and end; the longest walks come first."""
    starts = query_starts.long()
    lens = starts.diff()
    counts = (lens + block - 1) // block
    owner = torch.repeat_interleave(torch.arange(len(lens), device=lens.device), counts)
    before = (counts.cumsum(0) - counts)[owner]
    inner = (torch.arange(len(owner), device=lens.device) - before) * block
    order = inner.argsort(descending=True, stable=True)
    begin = starts[:-1][owner]
    return torch.stack([begin + inner, begin, starts[1:][owner]], 1)[order].int().contiguous()


def _launch(
    kernel: Any,
    tiles: Tensor,
    num_heads: int,
    values: tuple[Any, ...],
    heads: Heads,
    scale: float,
    window: int,
    softcap: float,
    **flags: bool,
) -> None:
    """A program a tile and head; does nothing without tokens."""
    total_heads, num_kv_heads, dim = heads
    if not len(tiles):
        return
    block = block_rows(dim, values[0].element_size())
    kernel[(len(tiles), num_heads)](
        *values,
        scale,
        softcap,
        window,
        H=total_heads,
        G=num_kv_heads,
        C=dim,
        BLOCK_C=max(16, triton.next_power_of_2(dim)),
        BLOCK=block,
        HAS_WINDOW=window > 0,
        HAS_CAP=softcap > 0,
        IS_CPU=not tiles.is_cuda,
        **flags,
        num_warps=4 if dim <= 128 else 8,
    )
