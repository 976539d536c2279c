"""Mesh and collectives on gloo: values and adjoints against the sums they stand for."""

from __future__ import annotations

import pytest
import torch

from sterna.core.errors import ConfigError
from sterna.parallel.collectives import all_gather, all_reduce, all_to_all, gather_objects, total
from sterna.parallel.config import ParallelConfig
from sterna.parallel.launch import LocalRanks, RankError
from sterna.parallel.mesh import Mesh, mesh_sizes, open_mesh, sub_axis

SELF = __file__


@pytest.fixture(scope="module")
def ranks():
    with LocalRanks() as pool:
        yield pool


def rows(rank, count, width=3):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, width, dtype=torch.float64, generator=generator)


def axes_of(config):
    mesh = open_mesh(ParallelConfig(**config))
    axes = [mesh.dp, mesh.sp, mesh.tp, mesh.data]
    return mesh.rank, mesh.world, [(a.name, a.ranks, a.rank) for a in axes]


def test_axes_of_a_dp_by_sp_mesh(ranks):
    found = ranks.run(4, f"{SELF}:axes_of", {"sp": 2})
    for rank, (own, world, axes) in enumerate(found):
        dp, sp = divmod(rank, 2)
        assert (own, world) == (rank, 4)
        assert axes[0] == ("dp", (sp, sp + 2), dp)
        assert axes[1] == ("sp", (2 * dp, 2 * dp + 1), sp)
        assert axes[2] == ("tp", (rank,), 0)
        assert axes[3] == ("data", (0, 1, 2, 3), rank)


@pytest.mark.parametrize(
    ("config", "world", "words"),
    [
        ({"sp": 3}, 4, ["4 processes", "sp 3", "needs 3"]),
        ({"dp": 2, "sp": 4}, 4, ["4 processes", "dp 2 x sp 4", "needs 8"]),
        ({"sp": 2}, 1, ["1 process started", "needs 2", "torchrun"]),
    ],
)
def test_a_wrong_world_is_named_with_its_numbers(config, world, words):
    with pytest.raises(ConfigError) as error:
        mesh_sizes(ParallelConfig(**config), world)
    assert [word for word in words if word not in str(error.value)] == []


def test_one_process_needs_no_group_and_collectives_return_their_input():
    mesh = open_mesh(ParallelConfig())
    x = rows(0, 4)
    assert mesh == Mesh.single()
    for y in (
        all_to_all(x, mesh.sp, [4], [4]),
        all_gather(x, mesh.sp, [4]),
        all_reduce(x, mesh.sp),
    ):
        assert y is x
    assert torch.equal(total(x, mesh.data), x)


def test_torchrun_variables_that_are_missing_are_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"RANK.*torchrun"):
        open_mesh(ParallelConfig())


def exchange(send):
    """All-to-all with uneven splits, its gradient, and a gather and a sum with theirs."""
    axis = open_mesh(ParallelConfig(sp=len(send))).sp
    me = axis.rank
    receive = [line[me] for line in send]
    x = rows(me, sum(send[me])).requires_grad_()
    y = all_to_all(x, axis, send[me], receive)
    (y * rows(100 + me, y.shape[0])).sum().backward()
    sizes = [line[0] for line in send]
    g = rows(200 + me, sizes[me]).requires_grad_()
    gathered = all_gather(g, axis, sizes)
    (gathered * rows(300 + me, sum(sizes))).sum().backward()
    r = rows(400 + me, 2).requires_grad_()
    summed = all_reduce(r, axis)
    (summed * rows(500 + me, 2)).sum().backward()
    return y.detach(), x.grad, gathered.detach(), g.grad, summed.detach(), r.grad


@pytest.mark.parametrize(
    "send", [[[2, 1], [3, 2]], [[1, 2, 0, 3], [1, 0, 2, 2], [4, 1, 1, 1], [2, 2, 2, 0]]]
)
def test_values_and_adjoints_with_uneven_splits(ranks, send):
    world = len(send)
    found = ranks.run(world, f"{SELF}:exchange", send)
    xs = [rows(i, sum(send[i])).split(send[i]) for i in range(world)]
    weights = [
        rows(100 + i, sum(line[i] for line in send)).split([line[i] for line in send])
        for i in range(world)
    ]
    sizes = [line[0] for line in send]
    gathers = [rows(300 + i, sum(sizes)).split(sizes) for i in range(world)]
    for me, (y, x_grad, gathered, g_grad, summed, r_grad) in enumerate(found):
        assert torch.equal(y, torch.cat([xs[i][me] for i in range(world)]))
        assert torch.equal(x_grad, torch.cat([weights[i][me] for i in range(world)]))
        assert torch.equal(gathered, torch.cat([rows(200 + i, n) for i, n in enumerate(sizes)]))
        torch.testing.assert_close(g_grad, sum(gathers[i][me] for i in range(world)))
        torch.testing.assert_close(summed, sum(rows(400 + i, 2) for i in range(world)))
        torch.testing.assert_close(r_grad, sum(rows(500 + i, 2) for i in range(world)))


def parts():
    axis = open_mesh(ParallelConfig(sp=4)).sp
    near, far = sub_axis(axis, "near", 2, 1), sub_axis(axis, "far", 2, 2)
    one = sub_axis(axis, "one", 1, 1)
    return near.ranks, far.ranks, one.size, gather_objects(axis.rank, far)


def test_an_axis_is_cut_into_neighbours_and_strides(ranks):
    found = ranks.run(4, f"{SELF}:parts")
    assert [near for near, *_ in found] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [far for _, far, *_ in found] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert all(one == 1 and list(far) == seen for _, far, one, seen in found)


def fail_on_one():
    mesh = open_mesh(ParallelConfig())
    if mesh.rank == 1:
        raise ValueError("deliberate")


def test_a_rank_that_raises_is_reported_and_the_pool_goes_on(ranks):
    with pytest.raises(RankError, match=r"rank 1 of 2(.|\n)*deliberate"):
        ranks.run(2, f"{SELF}:fail_on_one")
    assert ranks.run(2, f"{SELF}:axes_of", {})[1][:2] == (1, 2)
