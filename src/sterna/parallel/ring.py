"""Attention of a range of queries over all keys: what the ranks beyond the head limit compute.

Keys and values are gathered whole rather than passed around: measured faster by others at the
sizes where it fits (the default of PyTorch's context parallelism too), and the memory of K and V
of one head group is small. A ring that never holds all keys is the road not taken.

Plain PyTorch in tiles of queries: scores of one tile exist at a time, also in backward, which
computes them again. Causal order makes later ranges cost more; ranges are not balanced (no zigzag),
since contiguous ones are what packed documents and uneven splits need.

Legend: n queries of the range, S keys, H query heads, G key/value heads, C head_dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TILE_ROWS = 512  # queries whose scores exist at once


def attend_range(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    starts: Sequence[int],
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """q [n, H, C], the queries of rows first .. first + n; k, v [S, G, C] -> [n, H * C].

    `starts` are the document borders [D + 1] of the S rows. Causal, within documents; window and
    softcap as in `ops.attention`. Scores and sums in float32 (float64 for float64).
    """
    outputs = [q[:0].flatten(1)]
    for low, high in itertools.pairwise(starts):
        begin, end = max(low, first), min(high, first + q.shape[0])
        for row in range(begin, end, TILE_ROWS):
            stop = min(row + TILE_ROWS, end)
            seen = max(low, row - window + 1) if window > 0 else low
            tile = (q[row - first : stop - first], k[seen:stop], v[seen:stop])
            out = checkpoint(_tile, *tile, scale, window, softcap, use_reentrant=False)
            outputs.append(out.flatten(1))
    return torch.cat(outputs)


def _tile(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """The last n of the m rows of k, v [m, G, C] ask with q [n, H, C] -> [n, H, C]."""
    (n, num_heads, _), (m, num_kv_heads, _) = q.shape, k.shape
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    group = num_heads // num_kv_heads
    q_HnC = q.to(wide).transpose(0, 1)
    k_HmC = k.to(wide).transpose(0, 1).repeat_interleave(group, dim=0)
    v_HmC = v.to(wide).transpose(0, 1).repeat_interleave(group, dim=0)
    scores = q_HnC @ k_HmC.transpose(1, 2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(m - n, m, device=q.device)[:, None]
    j = torch.arange(m, device=q.device)[None, :]
    hidden = (j > i) | (j <= i - window) if window > 0 else j > i
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return (weights @ v_HmC).transpose(0, 1).to(q.dtype)
