"""Actors of a run in one process or many, called by name: the loop does not know where they are.

    LocalGroup     actors of this process; a call runs when it is started
    RemoteGroup    actors of other processes, and optionally one of this (rank 0), over pipes

Only what is small travels: token ids, log-probs, versions; weights have transport.py, gradients the
process group. `spawn.py` starts processes on this machine, or meets those that torchrun started.
Another runtime (Ray, Monarch) is a third class with these four methods.

Watchdog: a process that dies is seen at once, by the end of its pipe; one that does not answer
within `timeout_s` is named with the stack it was last seen in. Either ends the run; checkpoints
are written whole or not at all, so the newest one stands.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from sterna.core.errors import SternaError, WorkerError
from sterna.core.log import get_logger

_log = get_logger(__name__)
# How long the others may still answer after one rank failed: they may be waiting for it.
GRACE_S = 5.0
_STACK_S = 0.5


class WorkerGroup(Protocol):
    """Actors by rank. One call at a time; `finish` follows every `start`."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def start(self, method: str, args: Sequence[tuple[Any, ...]]) -> None:
        """Have each rank run `method(*args[rank])`."""
        ...

    def finish(self) -> list[Any]:
        """The results by rank. What a rank raised, or WorkerError for one that cannot answer."""
        ...

    def close(self) -> None:
        """End the actors; does nothing the second time."""
        ...


def everyone(group: WorkerGroup, method: str, *args: Any) -> list[Any]:
    """`method(*args)` on every rank; the results by rank."""
    group.start(method, [args] * group.size)
    return group.finish()


class LocalGroup:
    """Actors of this process, one after the other."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)
        self._results: list[Any] = []

    @property
    def size(self) -> int:
        """See WorkerGroup."""
        return len(self._actors)

    def start(self, method: str, args: Sequence[tuple[Any, ...]]) -> None:
        """See WorkerGroup; errors are raised here."""
        pairs = zip(self._actors, args, strict=True)
        self._results = [getattr(actor, method)(*each) for actor, each in pairs]

    def finish(self) -> list[Any]:
        """See WorkerGroup."""
        found, self._results = self._results, []
        return found

    def close(self) -> None:
        """See WorkerGroup."""
        for actor in self._actors:
            actor.close()
        self._actors = []


@dataclass(frozen=True, slots=True)
class Member:
    """Another process: its pipe, and what the watchdog knows of it."""

    rank: int
    pipe: Connection
    pid: int
    host: str
    stack: Path  # where it writes its stack when asked
    fate: Callable[[], str]  # " of signal 9" once it has ended

    def stack_text(self) -> str:
        """What it is doing, if it can still say so and is on this machine."""
        if self.host != socket.gethostname():
            return ""
        with suppress(OSError):
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(_STACK_S)
            return self.stack.read_text()
        return ""


class RemoteGroup:
    """Ranks in other processes; with `own`, rank 0 is an actor of this one, which takes part."""

    def __init__(
        self,
        members: Sequence[Member],
        timeout_s: float,
        own: Any = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._members = list(members)
        self._own = own
        self._timeout_s = timeout_s
        self._on_close = on_close
        self._method = ""
        self._own_result: Any = None
        self._own_error: Exception | None = None

    @property
    def size(self) -> int:
        """See WorkerGroup."""
        return len(self._members) + (self._own is not None)

    def start(self, method: str, args: Sequence[tuple[Any, ...]]) -> None:
        """See WorkerGroup. The own share is run here, beside the others'."""
        assert not self._method, "one call at a time"
        self._method = method
        rest = args if self._own is None else args[1:]
        for member, each in zip(self._members, rest, strict=True):
            try:
                put(member.pipe, (method, each))
            except OSError:
                raise self._died(member) from None
        if self._own is not None:
            self._run_own(method, args[0])

    def finish(self) -> list[Any]:
        """See WorkerGroup."""
        answers = self._answers()
        self._method = ""
        errors = [(rank, value) for rank, (ok, value) in sorted(answers.items()) if not ok]
        if self._own_error is not None:
            raise self._own_error
        for rank, error in errors:
            if isinstance(error, SternaError):
                error.add_note(f"raised on rank {rank}")
                raise error
            raise WorkerError(f"rank {rank} raised:\n{error}")
        found = [answers[member.rank][1] for member in self._members]
        return found if self._own is None else [self._own_result, *found]

    def close(self) -> None:
        """See WorkerGroup. Processes that hang are the starter's to end."""
        members, self._members = self._members, []
        for member in members:
            with suppress(OSError):
                put(member.pipe, None)
            member.pipe.close()
        if members:
            self._on_close()
        if self._own is not None:
            self._own.close()
            self._own = None

    def _run_own(self, method: str, args: tuple[Any, ...]) -> None:
        self._own_error = None
        try:
            self._own_result = getattr(self._own, method)(*args)
        except Exception as error:  # noqa: BLE001  raised by finish, when the others are known
            self._own_error = error

    def _answers(self) -> dict[int, tuple[bool, Any]]:
        """(is_ok, result) by rank; WorkerError names the dead and the silent."""
        limit = self._timeout_s if self._own_error is None else GRACE_S
        end = time.monotonic() + limit
        pending = {member.pipe: member for member in self._members}
        found: dict[int, tuple[bool, Any]] = {}
        while pending:
            ready = wait(list(pending), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                member = pending.pop(pipe)  # type: ignore[call-overload]
                try:
                    found[member.rank] = get(member.pipe)
                except (EOFError, OSError):
                    raise self._died(member) from self._own_error
                if not found[member.rank][0]:
                    end = min(end, time.monotonic() + GRACE_S)
        is_whole = self._own_error is None and all(ok for ok, _ in found.values())
        if pending and (is_whole or not isinstance(self._own_error, SternaError)):
            raise self._hangs(list(pending.values())) from self._own_error
        return found

    def _died(self, member: Member) -> WorkerError:
        return WorkerError(
            f"rank {member.rank} (process {member.pid} on {member.host}) died{member.fate()} in "
            f"`{self._method}`; the newest checkpoint is whole: continue with --resume"
        )

    def _hangs(self, members: Sequence[Member]) -> WorkerError:
        for member in members:
            text = member.stack_text()
            if text:
                _log.error("rank %d is in\n%s", member.rank, text)
        named = ", ".join(f"rank {m.rank} (process {m.pid} on {m.host})" for m in members)
        return WorkerError(
            f"{named} did not answer `{self._method}` within {self._timeout_s:g} s; its stack is "
            "above if it could give one. The newest checkpoint is whole: continue with --resume, "
            "and raise run.timeout_s if the machine is that slow"
        )


def put(pipe: Connection, value: Any) -> None:
    """Send a value whole: pipes by themselves would hand tensors on as open files."""
    pipe.send_bytes(pickle.dumps(value))


def get(pipe: Connection) -> Any:
    """The next value. EOFError, OSError when the other side is gone."""
    return pickle.loads(pipe.recv_bytes())


def serve(pipe: Connection, actor: Any) -> Any:
    """Answer calls until the group closes: None, or what it closed with; ends at a broken pipe."""
    while True:
        try:
            call = get(pipe)
        except (EOFError, OSError):
            return None
        if call is None:
            return None
        method, args = call
        try:
            answer = (True, getattr(actor, method)(*args))
        except Exception as error:  # noqa: BLE001  raised by the group
            answer = (False, _sendable(error))
        try:
            put(pipe, answer)
        except OSError:
            return None


def write_stack_when_asked(path: Path) -> None:
    """On SIGUSR1 the stacks of all threads go to `path`, even while Python is busy in C."""
    file = path.open("w")
    faulthandler.register(signal.SIGUSR1, file)


def _sendable(error: Exception) -> Any:
    """A SternaError itself where it survives the journey, else the traceback's text."""
    if isinstance(error, SternaError):
        with suppress(Exception):
            pickle.loads(pickle.dumps(error))
            return error
    return "".join(traceback.format_exception(error))
