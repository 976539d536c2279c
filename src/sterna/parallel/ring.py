"""Attention of a range of queries over all keys: what the ranks beyond the head limit compute.

Keys and values are gathered whole rather than passed around: measured faster by others at the
sizes where it fits (the default of PyTorch's context parallelism too), and the memory of K and V
of one head group is small. A ring that never holds all keys is the road not taken.

Plain PyTorch in tiles of queries: scores of one tile exist at a time, also in backward, which
computes them again.

Balance. Causal order makes later queries cost more: of two ranks with half a document each the
second has three quarters of the work. So queries (and outputs, on their way back) change ranks:
each rank's rows are cut into PIECES pieces, and pieces go to ranks by their cost, the dearest first
to the rank with least to do, as many to each. One document gives the zigzag of context parallelism
(Llama 3, arXiv 2407.21783, section 3.3.2); packed documents are balanced too, whatever their
lengths. Rows stay where they are outside attention, so nothing else has to know. It costs two
exchanges of one head group's queries beside the gathered keys and values.

Legend: n queries of the range, S keys, H query heads, G key/value heads, C head_dim.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sterna.parallel.collectives import all_to_all
from sterna.parallel.mesh import Axis

TILE_ROWS = 512  # queries whose scores exist at once
PIECES = 4  # of a rank's queries; of one document no rank has 3 % more work than the mean
# Pieces stay where they are unless some rank has this much more to do than the mean.
_WORTH_MOVING = 1.05


def chunk_sizes(total: int, parts: int) -> list[int]:
    """`total` rows in as many parts: the first `total % parts` have one more."""
    base, extra = divmod(total, parts)
    return [base + (i < extra) for i in range(parts)]


def attend_balanced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    axis: Axis,
    starts: Sequence[int],
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """q [lengths[rank], H, C], this rank's rows; k, v [S, G, C], of all -> [lengths[rank], H * C].

    The result is that of `attend_range` on these rows; who computes which row is balanced.
    """
    cuts = [size for length in lengths for size in chunk_sizes(length, PIECES)]
    bounds = list(itertools.accumulate(cuts, initial=0))
    owners = assign(bounds, starts, window, axis.size)
    moved = [
        [sum(cuts[i] for i in _pieces_of(home) if owners[i] == to) for to in range(axis.size)]
        for home in range(axis.size)
    ]
    send, receive = moved[axis.rank], [row[axis.rank] for row in moved]
    order = _order(bounds, owners, axis.rank, q.device)
    mine = all_to_all(q.index_select(0, order), axis, send, receive)
    outputs, at = [], 0
    for i, size in enumerate(cuts):
        if owners[i] == axis.rank:
            part = mine[at : at + size]
            outputs.append(attend_range(part, k, v, bounds[i], starts, scale, window, softcap))
            at += size
    back = all_to_all(torch.cat(outputs), axis, receive, send)
    return back.index_select(0, order.argsort())


def assign(bounds: Sequence[int], starts: Sequence[int], window: int, ranks: int) -> list[int]:
    """Which of `ranks` computes each piece [bounds[i], bounds[i + 1]), PIECES of them each.

    The same on every rank. Pieces stay with the rank that holds them where that is balanced.
    """
    before = [cost_before(bound, starts, window) for bound in bounds]
    costs = [b - a for a, b in itertools.pairwise(before)]
    homes = [i // PIECES for i in range(len(costs))]
    plain = [sum(costs[i] for i in _pieces_of(rank)) for rank in range(ranks)]
    if max(plain) * ranks <= _WORTH_MOVING * before[-1]:
        return homes
    owners, loads, counts = [0] * len(costs), [0] * ranks, [0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        room = [rank for rank in range(ranks) if counts[rank] < PIECES]
        best = min(room, key=lambda rank: (loads[rank], rank != homes[i], rank))
        owners[i] = best
        loads[best] += costs[i]
        counts[best] += 1
    return owners


def cost_before(row: int, starts: Sequence[int], window: int) -> int:
    """Scores of the queries before `row`: each sees its document's keys up to itself."""
    last = bisect_right(starts, row) - 1
    whole = sum(_scores(b - a, window) for a, b in itertools.pairwise(starts[: last + 1]))
    return whole + _scores(row - starts[last], window)


def _scores(n: int, window: int) -> int:
    """Of the first n queries of a document."""
    full = min(n, window) if window > 0 else n
    return full * (full + 1) // 2 + (n - full) * window


def _pieces_of(rank: int) -> range:
    return range(rank * PIECES, (rank + 1) * PIECES)


def _order(bounds: Sequence[int], owners: Sequence[int], rank: int, device: torch.device) -> Tensor:
    """This rank's rows by the rank they go to."""
    first = bounds[rank * PIECES]
    pieces = sorted(_pieces_of(rank), key=lambda i: owners[i])
    rows = [torch.arange(bounds[i] - first, bounds[i + 1] - first) for i in pieces]
    return torch.cat(rows).to(device)


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
