"""The mesh: which rank holds which rows, which part of a row and which part of a weight.

rank = (dp_idx * sp + sp_idx) * tp + tp_idx, so the ranks that talk most are neighbours. An axis of
size 1 has no process group, and a mesh of one rank needs no torch.distributed at all: its
collectives do nothing (see collectives.py).

`data` is dp x sp: the axis over which token counts are summed and gradients are reduced, since
the ranks of both see different tokens.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist

from sterna.core.errors import ConfigError
from sterna.parallel.config import ParallelConfig


@dataclass(frozen=True, slots=True)
class Axis:
    """The ranks of one direction of the mesh that this process belongs to."""

    name: str
    ranks: tuple[int, ...] = (0,)  # global ranks, in axis order
    rank: int = 0  # this process's place in `ranks`
    group: dist.ProcessGroup | None = None  # None when there is one rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


@dataclass(frozen=True, slots=True)
class Mesh:
    """All axes of this process. `Mesh.single()` is one process without torch.distributed."""

    dp: Axis
    sp: Axis
    tp: Axis
    data: Axis  # dp x sp
    device: torch.device

    @staticmethod
    def single(device: torch.device | str = "cpu") -> Mesh:
        """The mesh of one process."""
        dp, sp, tp, data = (Axis(name) for name in ("dp", "sp", "tp", "data"))
        return Mesh(dp, sp, tp, data, torch.device(device))

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return self.dp.ranks[self.dp.rank]

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.data.size * self.tp.size

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and files."""
        return self.rank == 0


def mesh_sizes(config: ParallelConfig, world: int) -> tuple[int, int, int]:
    """(dp, sp, tp) for `world` processes; ConfigError when their product is not `world`."""
    inner = config.sp * config.tp
    dp = config.dp if config.dp is not None else max(1, world // inner)
    if dp * inner == world:
        return dp, config.sp, config.tp
    raise ConfigError(
        f"{world} process{'es' if world != 1 else ''} started, but dp {dp} x sp {config.sp} x "
        f"tp {config.tp} needs {dp * inner}; start {dp * inner} (torchrun --nproc-per-node), or "
        f"choose parallel.dp and parallel.sp whose product is {world // config.tp}",
        param="parallel",
    )


def open_mesh(config: ParallelConfig, device: torch.device | str = "cpu") -> Mesh:
    """The mesh of this process, from torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Without that environment it is one process. torch.distributed is started when there is more
    than one (gloo on CPU, nccl on CUDA) and left alone when it already runs. Raises ConfigError
    when dp x sp x tp is not the number of processes.
    """
    device = torch.device(device)
    started = dist.is_initialized()
    world = dist.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1"))
    sizes = mesh_sizes(config, world)
    if world == 1:
        return Mesh.single(device)
    if not started:
        _start(device, config.timeout_s)
    return _build(sizes, device)


def close_mesh() -> None:
    """Leave torch.distributed; does nothing when it was never started."""
    _group.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def sub_axis(axis: Axis, name: str, size: int, stride: int) -> Axis:
    """The part of `axis` this rank belongs to when it is cut into groups of `size`.

    `stride` 1 takes neighbours; stride s takes every s-th rank of blocks of size * s. Every rank
    of the whole world has to call this together, since groups are made here.
    """
    if axis.size % (size * stride):
        raise ConfigError(
            f"an axis of {axis.size} ranks cannot be cut into groups of {size} with stride {stride}"
        )
    if size == 1:
        return Axis(name, (axis.ranks[axis.rank],))
    local = [
        axis.ranks[block + offset : block + offset + size * stride : stride]
        for block in range(0, axis.size, size * stride)
        for offset in range(stride)
    ]
    gathered: list[list[tuple[int, ...]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, local)
    return _axis(name, sorted({ranks for lists in gathered for ranks in lists}))


def _start(device: torch.device, timeout_s: float) -> None:
    missing = [key for key in ("RANK", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start "
            "with torchrun, which sets them"
        )
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def _build(sizes: tuple[int, int, int], device: torch.device) -> Mesh:
    grid = torch.arange(dist.get_world_size()).view(*sizes)  # [dp, sp, tp]
    lines = {
        "dp": grid.permute(1, 2, 0).reshape(-1, sizes[0]),
        "sp": grid.permute(0, 2, 1).reshape(-1, sizes[1]),
        "tp": grid.reshape(-1, sizes[2]),
        "data": grid.permute(2, 0, 1).reshape(sizes[2], -1),
    }
    axes = {n: _axis(n, [tuple(line) for line in grid.tolist()]) for n, grid in lines.items()}
    return Mesh(**axes, device=device)


def _axis(name: str, lists: list[tuple[int, ...]]) -> Axis:
    """Make the groups of every list (all ranks do, in one order) and keep this rank's."""
    me, own = dist.get_rank(), Axis(name)
    for ranks in lists:
        group = _group(ranks) if len(ranks) > 1 else None
        if me in ranks:
            own = Axis(name, ranks, ranks.index(me), group)
    return own


@cache
def _group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """One group for equal ranks: a group costs a connection to each member for good."""
    group: dist.ProcessGroup = dist.new_group(list(ranks))
    return group
