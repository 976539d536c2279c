"""Rows cut along the sequence: nothing is lost, targets are shifted before the cut."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch.utils.data import DataLoader

from sterna.core.errors import ConfigError
from sterna.model.batch import Batch
from sterna.parallel.config import ParallelConfig
from sterna.parallel.launch import LocalRanks
from sterna.parallel.mesh import Axis, open_mesh
from sterna.parallel.ring import PIECES, assign, attend_range, chunk_sizes, cost_before
from sterna.parallel.shard_rows import SequenceShards, flatten, shard_batch
from sterna.parallel.ulysses import heads_degree, kv_heads_of_groups

SELF = __file__


def axis(size, rank):
    return Axis("sp", tuple(range(size)), rank)


@pytest.mark.parametrize(("total", "parts"), [(12, 4), (13, 4), (3, 2), (7, 7)])
def test_shards_are_even_to_one_and_join_to_the_row(total, parts):
    sizes = chunk_sizes(total, parts)
    assert sum(sizes) == total and max(sizes) - min(sizes) <= 1
    ids = torch.arange(total, dtype=torch.int32)
    batch = Batch(ids, ids + 100, torch.tensor([0, 2, total]), torch.tensor([2, total - 2]))
    cut = [shard_batch(batch, ids.long() + 200, axis(parts, r)) for r in range(parts)]
    assert torch.equal(torch.cat([b.tokens for b, _ in cut]), batch.tokens)
    assert torch.equal(torch.cat([b.positions for b, _ in cut]), batch.positions)
    assert torch.equal(torch.cat([t for _, t in cut]), ids.long() + 200)
    assert all(b.query_starts is batch.query_starts for b, _ in cut)


def test_fewer_tokens_than_ranks_are_refused_with_numbers():
    ids = torch.arange(3)
    batch = Batch(ids, ids, torch.tensor([0, 3]), torch.tensor([3]))
    with pytest.raises(ConfigError, match=r"3 tokens.*4 sp ranks"):
        shard_batch(batch, ids, axis(4, 0))


def test_padding_goes_labels_shift_and_rows_are_documents():
    row = flatten(
        {
            "input_ids": torch.tensor([[5, 6, 7, 0], [0, 0, 8, 9]]),
            "labels": torch.tensor([[-100, 6, 7, -100], [-100, -100, 8, 9]]),
            "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]]),
        }
    )
    assert row.tokens.tolist() == [5, 6, 7, 8, 9]
    assert row.positions.tolist() == [0, 1, 2, 0, 1]
    assert row.targets.tolist() == [6, 7, -100, 9, -100]
    assert row.starts.tolist() == [0, 3, 5]


def test_position_ids_say_where_packed_documents_begin():
    places = torch.tensor([[0, 1, 2, 0, 1]])
    row = flatten({"input_ids": torch.tensor([[1, 2, 3, 4, 5]]), "position_ids": places})
    assert row.starts.tolist() == [0, 3, 5]
    assert row.targets.tolist() == [2, 3, -100, 5, -100]
    assert row.positions.tolist() == [0, 1, 2, 0, 1]


def samples():
    torch.manual_seed(3)
    return [
        {"input_ids": torch.randint(0, 50, (11,)), "labels": torch.arange(11)} for _ in range(5)
    ]


def shards_of_a_loader():
    """Every rank shuffles by itself, with another seed: only the first rank's order counts."""
    mesh = open_mesh(ParallelConfig(sp=2))
    rows = samples()
    torch.manual_seed(mesh.rank)
    loader = DataLoader(rows, batch_size=2, shuffle=True)
    return [(r.tokens, r.targets, r.starts) for r in SequenceShards(loader, mesh.sp)]


def test_a_plain_data_loader_is_cut_along_the_sequence():
    with LocalRanks() as ranks:
        halves = ranks.run(2, f"{SELF}:shards_of_a_loader")
    assert len(halves[0]) == len(halves[1]) == 3
    known = sorted(row["input_ids"].tolist() for row in samples())
    seen = []
    for (a, _, starts), (b, _, _) in zip(*halves, strict=True):
        tokens = torch.cat([a, b])
        assert abs(len(a) - len(b)) <= 1
        seen += [tokens[x:y].tolist() for x, y in itertools.pairwise(starts.tolist())]
    assert sorted(seen) == known


@pytest.mark.parametrize(
    ("heads", "kv_heads", "groups", "expected"),
    [
        (8, 8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (8, 2, 4, [[0], [0], [1], [1]]),
        (8, 1, 4, [[0]] * 4),
        (6, 2, 2, [[0], [1]]),
        (6, 2, 3, [[0, 0], [0, 1], [1, 1]]),  # two query heads of a group need two kv heads
    ],
)
def test_every_group_gets_the_kv_heads_its_queries_need(heads, kv_heads, groups, expected):
    assert kv_heads_of_groups(heads, kv_heads, groups) == expected


def test_the_degree_is_what_heads_and_ranks_share():
    assert [heads_degree(p, 28) for p in (1, 4, 8, 6)] == [1, 4, 4, 2]
    with pytest.raises(ConfigError, match="allow 1, 2, 4"):
        heads_degree(8, 28, 8)


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (3, 10.0)])
def test_a_range_of_queries_is_a_slice_of_attention(window, softcap, monkeypatch):
    from sterna.kernels import reference
    from sterna.parallel import ring

    monkeypatch.setattr(ring, "TILE_ROWS", 4)
    torch.manual_seed(0)
    starts, total = [0, 6, 7, 23], 23
    q = torch.randn(total, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, total, 2, 8, dtype=torch.float64).requires_grad_()
    qkv = torch.cat([q, k, v], dim=1).flatten(1)
    options = (4, 2, 8, 0.3, window, softcap)
    whole = reference.attention(qkv, torch.tensor(starts), *options)
    for first, size in ((0, 23), (4, 9), (7, 3), (20, 3), (5, 0)):
        part = attend_range(q[first : first + size], k, v, first, starts, 0.3, window, softcap)
        torch.testing.assert_close(part, whole[first : first + size], rtol=0, atol=1e-12)


def test_costs_are_the_scores_there_are():
    starts, window = [0, 5, 5, 18, 31], 4
    for used in (0, window):
        seen = [min(i - a + 1, used or 99) for a, b in itertools.pairwise(starts)
                for i in range(a, b)]  # fmt: skip
        found = [cost_before(row, starts, used) for row in range(32)]
        assert found == [sum(seen[:row]) for row in range(32)]


def loads(starts, ranks, owners=None, window=0):
    """Work of each rank beside the mean; `owners` None = every rank its own rows."""
    cuts = [n for length in chunk_sizes(starts[-1], ranks) for n in chunk_sizes(length, PIECES)]
    bounds = list(itertools.accumulate(cuts, initial=0))
    owners = assign(bounds, starts, window, ranks) if owners is None else owners
    work, counts = [0] * ranks, [0] * ranks
    for i, owner in enumerate(owners):
        work[owner] += cost_before(bounds[i + 1], starts, window)
        work[owner] -= cost_before(bounds[i], starts, window)
        counts[owner] += 1
    assert counts == [PIECES] * ranks  # as many tokens too
    return max(work) * ranks / sum(work)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ring_ranks_share_the_work(ranks):
    """One document: up to 1.88 times the mean before. Packed ones as they come."""
    plain = [i // PIECES for i in range(ranks * PIECES)]
    assert loads([0, 1 << 16], ranks, plain) > 1.49
    assert loads([0, 1 << 16], ranks) < 1.03
    draw = random.Random(ranks)
    for _ in range(20):
        lens = [draw.choice((10, 300, 5000)) for _ in range(40)]
        starts = list(itertools.accumulate(lens, initial=0))
        assert loads(starts, ranks) <= min(loads(starts, ranks, plain), 1.25)
    assert loads([0, 1 << 16], ranks, window=64) < 1.01  # even as it is: nothing moves
