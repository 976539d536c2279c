"""Ranks on this machine: a few processes that run one function together over gloo.

For certificates (`sterna train --verify`) and tests. A run of many ranks in earnest is started by
torchrun. The processes of a world size stay up between calls, since importing torch costs more
than a tiny case, and keep their process group: PyTorch caches group names beyond a group's life.
They meet at a file, so no port is taken.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from sterna.core.errors import SternaError


class RankError(SternaError):
    """A function raised on some rank; the message holds that rank's traceback."""

    code = "rank_failed"


class LocalRanks:
    """Processes of one thread each, started when a world size is first asked for.

    Use as a context manager.
    """

    def __init__(self) -> None:
        self._worlds: dict[int, _World] = {}

    def run(self, world: int, function: str, *args: Any, timeout_s: float = 300.0) -> list[Any]:
        """`function(*args)` on `world` ranks that share a process group; results by rank.

        `function`: "package.module:name" or "path/to/file.py:name"; arguments and results are
        pickled. Raises RankError when a rank raises, dies or takes longer than `timeout_s`; its
        processes are then ended, since the others wait for it, and started anew at the next call.
        """
        ranks = self._worlds.get(world) or _World(world)
        self._worlds[world] = ranks
        try:
            return ranks.run(function, args, timeout_s)
        except RankError:
            self._worlds.pop(world).close()
            raise

    def close(self) -> None:
        """End the processes; does nothing when none runs."""
        for ranks in self._worlds.values():
            ranks.close()
        self._worlds = {}

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _World:
    """The processes of one world size."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        meeting = Path(self._folder.name) / "rendezvous"
        self._workers = [_start(rank, size, meeting) for rank in range(size)]

    def run(self, function: str, args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        size, results = len(self._workers), []
        for _, pipe in self._workers:
            pipe.send((function, args))
        for rank, (_, pipe) in enumerate(self._workers):
            where = f"rank {rank} of {size} in {function}"
            try:
                if not pipe.poll(timeout_s):
                    raise RankError(f"{where}: took over {timeout_s} s")
                is_ok, value = pipe.recv()
            except (EOFError, OSError) as error:
                raise RankError(f"{where}: the process died") from error
            if not is_ok:
                raise RankError(f"{where}:\n{value}")
            results.append(value)
        return results

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.wait()
        self._folder.cleanup()


def _start(rank: int, world: int, meeting: Path) -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = socket.socketpair()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "sterna.parallel.launch"]
    numbers = (theirs.fileno(), rank, world)
    process = subprocess.Popen(
        [*command, *map(str, numbers), str(meeting)], pass_fds=[theirs.fileno()], env=env
    )
    theirs.close()
    return process, Connection(ours.detach())


def _function(name: str) -> Callable[..., Any]:
    place, _, leaf = name.rpartition(":")
    module = _module_of_file(place) if place.endswith(".py") else importlib.import_module(place)
    found: Callable[..., Any] = getattr(module, leaf)
    return found


def _module_of_file(path: str) -> ModuleType:
    name = "ranks_" + str(abs(hash(path)))
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _serve(pipe: Connection, rank: int, world: int, meeting: str) -> None:
    """Run calls until the other side closes."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world
        )
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            return
        try:
            payload = pickle.dumps((True, _function(name)(*args)))
        except BaseException:  # noqa: BLE001  the parent raises it
            payload = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(payload)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
