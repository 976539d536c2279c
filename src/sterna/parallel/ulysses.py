"""Attention of a row that is cut along the sequence: tokens travel, then heads, then back.

Ulysses (arXiv 2309.14509; ALST, 2506.13996). P sp ranks hold S tokens in P contiguous chunks,
uneven by at most one, so no padding exists. Around attention an all-to-all turns "my tokens, all
heads" into "all tokens, my heads" and another turns the outputs back. Whatever attends inside sees
whole documents, so packing, windows and softcaps stay the model's own.

Heads beyond the limit. Only Pu = gcd(P, query heads) ranks can share heads evenly. The other factor
Pr = P / Pu gathers keys and values: rank (r, u) holds the queries of segment r for head group u,
and the ranks of a ring share the work of all queries evenly (ring.py). sp rank = r * Pu + u, so a
segment is contiguous.

Few key/value heads. Group u has query heads [u * Hu, (u + 1) * Hu) and gets the kv heads these
need, repeated where two groups need the same; the gradient of the repetition sums the copies.

Legend: t tokens of a rank, S tokens of the row, H query heads, G key/value heads, C head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sterna.core.errors import ConfigError
from sterna.parallel.collectives import all_gather, all_to_all
from sterna.parallel.mesh import Axis, Mesh, sub_axis
from sterna.parallel.ring import attend_balanced, chunk_sizes

# (qkv [S, (H + 2G) * C], query_starts, H, G, C, scale, window, softcap) -> [S, H * C]
Attend = Callable[..., Tensor]


def heads_degree(axis_size: int, num_heads: int, asked: int | None = None) -> int:
    """How many of `axis_size` sp ranks exchange heads; ConfigError when `asked` cannot."""
    most = math.gcd(axis_size, num_heads)
    if asked is None:
        return most
    if most % asked:
        allowed = [d for d in range(1, most + 1) if most % d == 0]
        raise ConfigError(
            f"parallel.ulysses is {asked}, but {axis_size} sp ranks and {num_heads} query heads "
            f"allow {', '.join(map(str, allowed))}; the rest of sp gathers keys and values",
            param="parallel.ulysses",
        )
    return asked


def kv_heads_of_groups(num_heads: int, num_kv_heads: int, groups: int) -> list[list[int]]:
    """The kv heads each group of query heads gets; all lists are of one length.

    A length that divides the group's query heads evenly, in the order grouped attention expects.
    """
    own, shared = num_heads // groups, num_heads // num_kv_heads
    needed = [[h // shared for h in range(u * own, (u + 1) * own)] for u in range(groups)]
    if own % shared == 0 or shared % own == 0:
        return [sorted(set(heads)) for heads in needed]
    return needed


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """How one model's attention is spread over the sp axis. Made by `plan_attention`."""

    sp: Axis
    heads: Axis  # ranks that exchange heads for tokens
    ring: Axis  # ranks that gather keys and values

    def attend(
        self,
        qkv: Tensor,
        query_starts: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        window: int,
        softcap: float,
        attend: Attend,
    ) -> Tensor:
        """This rank's tokens qkv [t, (H + 2G) * C] after rope -> [t, H * C].

        `query_starts` are those of the whole row. `attend` is `ops.attention` or its like.
        """
        total = int(query_starts[-1])
        sizes = self._sizes(total, qkv.shape[0])
        kv_heads = kv_heads_of_groups(num_heads, num_kv_heads, self.heads.size)
        shape = (num_heads // self.heads.size, len(kv_heads[0]), head_dim)
        mine = self._to_heads(qkv.view(qkv.shape[0], -1, head_dim), num_heads, kv_heads, sizes)
        if self.ring.size == 1:
            out = attend(mine.flatten(1), query_starts, *shape, scale, window, softcap)
        else:
            out = self._gathered(mine, shape, sizes, query_starts, scale, window, softcap)
        return self._to_tokens(out, sizes)

    def _sizes(self, total: int, own: int) -> list[int]:
        sizes = chunk_sizes(total, self.sp.size)
        if sizes[self.sp.rank] != own:
            raise ConfigError(
                f"sp rank {self.sp.rank} holds {own} of {total} tokens, {sizes[self.sp.rank]} are "
                "expected; cut rows with parallel.shard_rows"
            )
        return sizes

    def _segment(self, sizes: Sequence[int], ring_rank: int) -> list[int]:
        """Chunk sizes of the ranks that exchange heads within one ring rank's segment."""
        width = self.heads.size
        return list(sizes[ring_rank * width : (ring_rank + 1) * width])

    def _to_heads(
        self, qkv: Tensor, num_heads: int, kv_heads: list[list[int]], sizes: list[int]
    ) -> Tensor:
        """[t, H + 2G, C] -> [tokens of my segment, Hu + 2Gu, C] of my head group."""
        groups = self.heads.size
        if groups == 1:
            return qkv
        order = [h for u in range(groups) for h in self._group(num_heads, qkv, kv_heads, u)]
        picked = qkv.index_select(1, torch.tensor(order, device=qkv.device))
        t, _, c = qkv.shape
        sent = picked.view(t, groups, -1, c).transpose(0, 1).reshape(groups * t, -1, c)
        return all_to_all(sent, self.heads, [t] * groups, self._segment(sizes, self.ring.rank))

    def _group(
        self, num_heads: int, qkv: Tensor, kv_heads: list[list[int]], group: int
    ) -> list[int]:
        """The rows of the head dim that belong to a group: its queries, keys, values."""
        own, num_kv_heads = num_heads // self.heads.size, (qkv.shape[1] - num_heads) // 2
        queries = list(range(group * own, (group + 1) * own))
        keys = [num_heads + h for h in kv_heads[group]]
        return [*queries, *keys, *(h + num_kv_heads for h in keys)]

    def _gathered(
        self,
        qkv: Tensor,
        shape: tuple[int, int, int],
        sizes: list[int],
        query_starts: Tensor,
        *rest: Any,
    ) -> Tensor:
        """Queries of my segment over the keys and values of all segments."""
        num_heads, num_kv_heads, _ = shape
        q, kv = torch.split(qkv, [num_heads, 2 * num_kv_heads], dim=1)
        lengths = [sum(self._segment(sizes, r)) for r in range(self.ring.size)]
        k, v = all_gather(kv, self.ring, lengths).chunk(2, dim=1)
        return attend_balanced(q, k, v, lengths, self.ring, query_starts.tolist(), *rest)

    def _to_tokens(self, out: Tensor, sizes: list[int]) -> Tensor:
        """[tokens of my segment, Hu * C] -> [t, H * C]."""
        groups, t = self.heads.size, sizes[self.sp.rank]
        if groups == 1:
            return out
        segment = self._segment(sizes, self.ring.rank)
        received = all_to_all(out, self.heads, segment, [t] * groups)
        return received.view(groups, t, out.shape[1]).transpose(0, 1).reshape(t, -1)


def plan_attention(mesh: Mesh, num_heads: int, ulysses: int | None = None) -> ParallelPlan | None:
    """The plan of a model with `num_heads` query heads; None when sp is 1.

    Makes process groups: every rank has to call it together. Raises ConfigError for an `ulysses`
    degree that sp or the heads do not allow.
    """
    sp = mesh.sp
    if sp.size == 1:
        return None
    degree = heads_degree(sp.size, num_heads, ulysses)
    heads = sub_axis(sp, "heads", degree, 1)
    return ParallelPlan(sp, heads, sub_axis(sp, "ring", sp.size // degree, degree))
