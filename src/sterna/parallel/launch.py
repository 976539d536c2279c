"""Ranks on this machine: a few processes that run one function together over gloo.

For certificates (`sterna train --verify`) and tests. A run of many ranks in earnest is started by
torchrun. The processes stay up between calls, since importing torch costs more than a tiny case;
each call makes a fresh process group of the asked size with a file rendezvous, so no port is taken.
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
    """Up to `size` processes, one thread each. Use as a context manager."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[tuple[subprocess.Popen[bytes], Connection]] = []

    def run(self, world: int, function: str, *args: Any, timeout_s: float = 300.0) -> list[Any]:
        """`function(*args)` on `world` ranks that share a process group; results by rank.

        `function`: "package.module:name" or "path/to/file.py:name"; arguments and results are
        pickled. Raises RankError when a rank raises, dies or takes longer than `timeout_s`; all
        processes are then ended, since the others wait for it, and started anew at the next call.
        """
        assert 1 <= world <= self.size
        self._start()
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(self._workers[:world]):
                pipe.send((rank, world, str(Path(folder) / "rendezvous"), function, args))
            return self._collect(world, function, timeout_s)

    def close(self) -> None:
        """End the processes; does nothing when none runs."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.wait()
        self._workers = []

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> None:
        while len(self._workers) < self.size:
            ours, theirs = socket.socketpair()
            env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            process = subprocess.Popen(
                [sys.executable, "-m", "sterna.parallel.launch", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=env,
            )
            theirs.close()
            self._workers.append((process, Connection(ours.detach())))

    def _collect(self, world: int, function: str, timeout_s: float) -> list[Any]:
        results = []
        for rank, (_, pipe) in enumerate(self._workers[:world]):
            try:
                if not pipe.poll(timeout_s):
                    raise RankError(f"rank {rank} of {world}: {function} took over {timeout_s} s")
                is_ok, value = pipe.recv()
                if not is_ok:
                    raise RankError(f"rank {rank} of {world} in {function}:\n{value}")
            except (EOFError, OSError) as error:
                self.close()
                raise RankError(f"rank {rank} of {world} died in {function}") from error
            except RankError:
                self.close()
                raise
            results.append(value)
        return results


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


def _serve(pipe: Connection) -> None:
    """Run calls until the other side closes."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            rank, world, rendezvous, name, args = pipe.recv()
        except EOFError:
            return
        try:
            if world > 1:
                dist.init_process_group(
                    "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world
                )
            reply = (True, _function(name)(*args))
            payload = pickle.dumps(reply)
        except BaseException:  # noqa: BLE001  the parent raises it
            payload = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(payload)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
