"""Where moves between tiers happen while the model computes: a worker thread or a CUDA stream.

A lane runs its jobs in the order they were given. `wait` is for one of them, `finish` for all.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

Job = Callable[[], None]
Ticket = Any


class Lane(Protocol):
    """Runs jobs one after the other, beside the caller."""

    def run(self, job: Job) -> Ticket:
        """Start a job after those before it."""
        ...

    def wait(self, ticket: Ticket) -> None:
        """What is computed from here on sees what the job did. Raises what the job raised."""
        ...

    def finish(self) -> None:
        """Return when every job has ended. Raises what one of them raised."""
        ...


class ThreadLane:
    """A worker thread: for files, whose reads and writes leave Python's lock."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="offload")
        self._pending: list[Future[None]] = []

    def run(self, job: Job) -> Ticket:
        """See Lane."""
        self._pending = [f for f in self._pending if not f.done() or f.exception() is not None]
        self._pending.append(self._pool.submit(job))
        return self._pending[-1]

    def wait(self, ticket: Ticket) -> None:
        """See Lane."""
        ticket.result()

    def finish(self) -> None:
        """See Lane."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()


class StreamLane:
    """A CUDA stream: for pinned memory. Not run on a GPU so far.

    A job begins after all that the caller's stream was given before it, so a buffer is not
    overwritten while it is read. Events are recorded outside `with stream`: inside, the current
    stream is the lane's own and waiting for it would be waiting for nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda: Any = torch.cuda  # its classes are untyped
        self._stream = self._cuda.Stream(device)
        self._device = device

    def run(self, job: Job) -> Ticket:
        """See Lane."""
        given, done = self._cuda.Event(), self._cuda.Event()
        given.record(torch.cuda.current_stream(self._device))
        self._stream.wait_event(given)
        with torch.cuda.stream(self._stream):
            job()
        done.record(self._stream)
        return done

    def wait(self, ticket: Ticket) -> None:
        """See Lane."""
        torch.cuda.current_stream(self._device).wait_event(ticket)

    def finish(self) -> None:
        """See Lane."""
        self._stream.synchronize()
