"""Where the processes of a RemoteGroup come from: started here, or met under torchrun."""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from sterna.align.workers import Member, RemoteGroup, get, put, serve, write_stack_when_asked
from sterna.core.errors import WorkerError

_MAIN = "sterna.align.spawn"
START_S = 600.0  # to import torch and load a model
_END_S = 5.0


def spawn(
    factory: str, args: Sequence[tuple[Any, ...]], timeout_s: float, threads: int = 1
) -> RemoteGroup:
    """One process an entry of `args`, whose actor is `factory(*args[rank])` ("module:name").

    Returns when all actors are built. WorkerError, with all processes ended, when one fails.
    """
    folder = tempfile.TemporaryDirectory(prefix="sterna-ranks-")
    started: list[tuple[subprocess.Popen[bytes], Member]] = []

    def end() -> None:
        for process, member in started:
            member.pipe.close()
            _end(process)
        folder.cleanup()

    try:
        for rank in range(len(args)):
            started.append(_start(rank, Path(folder.name), threads))
        group = RemoteGroup([member for _, member in started], START_S, on_close=end)
        group.start("build", [(factory, each) for each in args])
        group.finish()
    except BaseException:
        end()
        raise
    return RemoteGroup([member for _, member in started], timeout_s, on_close=end)


def _start(rank: int, folder: Path, threads: int) -> tuple[subprocess.Popen[bytes], Member]:
    ours, theirs = socket.socketpair()
    stack = folder / f"rank-{rank}.stack"
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, "-m", _MAIN, str(theirs.fileno()), str(stack)]
    process = subprocess.Popen(words, pass_fds=[theirs.fileno()], env=env)
    theirs.close()
    member = Member(
        rank, Connection(ours.detach()), process.pid, socket.gethostname(), stack, _fate(process)
    )
    return process, member


def _fate(process: subprocess.Popen[bytes]) -> Callable[[], str]:
    def fate() -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(1.0)
            return f" of signal {-code}" if code < 0 else f" with exit code {code}"
        return ""

    return fate


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_END_S)  # its pipe is closed, so it leaves by itself unless it hangs
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def meet(rank: int, world: int, share: Callable[[Any], Any], own: Any, timeout_s: float) -> Any:
    """Ranks that exist already: a RemoteGroup on rank 0, and None on the others when it closed.

    `share(value)` gives rank 0's value to all ranks. Ranks other than 0 serve `own` until then.
    """
    key = share(secrets.token_bytes(32) if rank == 0 else None)
    if rank == 0:
        return _gather(world, share, own, timeout_s, key)
    address = share(None)
    with Client(address, authkey=key) as pipe:
        folder = tempfile.TemporaryDirectory(prefix="sterna-ranks-")
        stack = Path(folder.name) / f"rank-{rank}.stack"
        write_stack_when_asked(stack)
        put(pipe, (rank, os.getpid(), socket.gethostname(), stack))
        serve(pipe, own)
        folder.cleanup()
    return None


def _gather(
    world: int, share: Callable[[Any], Any], own: Any, timeout_s: float, key: bytes
) -> RemoteGroup:
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with Listener((host, 0), backlog=world, authkey=key) as listener:
        share(listener.address)
        members = []
        for _ in range(world - 1):
            pipe = listener.accept()
            rank, pid, where, stack = get(pipe)
            members.append(Member(rank, pipe, pid, where, stack, lambda: ""))
    return RemoteGroup(sorted(members, key=lambda member: member.rank), timeout_s, own)


class _Host:
    """The actor of a spawned process, once it is built."""

    def __init__(self) -> None:
        self._actor: Any = None

    def build(self, factory: str, args: tuple[Any, ...]) -> None:
        """Make the actor."""
        module, _, name = factory.rpartition(":")
        self._actor = getattr(importlib.import_module(module), name)(*args)

    def __getattr__(self, name: str) -> Any:
        if self.__dict__.get("_actor") is None:
            raise WorkerError(f"`{name}` was called before the actor was built")
        return getattr(self._actor, name)


def main(handle: int, stack: Path) -> None:
    """Serve one actor over the inherited pipe; leaves when the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run's own process ends this one
    write_stack_when_asked(stack)
    serve(Connection(handle), _Host())


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
