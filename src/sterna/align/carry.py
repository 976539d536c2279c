"""How the trainer's weights come to the processes of `rollout.workers`: by a transport each step.

shared      a mapped file of this machine (SharedFile): one copy in, one out
broadcast   a gloo group of trainer and workers on loopback (Broadcast): the way that also works
            between machines, for groups of one's own; its buckets are copied by every process
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sterna.align.broadcast import Broadcast
from sterna.align.transport import SharedFile, WeightTransport
from sterna.align.workers import WorkerGroup, everyone
from sterna.core.errors import TransportError

_LOOPBACK = "127.0.0.1"
_c10d: Any = dist  # its C++ classes are untyped


class Carried:
    """Shows ranks a version by a transport: they hold copies of the trainer's weights."""

    def __init__(
        self,
        transport: WeightTransport,
        receiver: WeightTransport | Room,
        weights: Mapping[str, Tensor],
    ) -> None:
        """`transport` sends `weights`, the trainer's; every rank receives by `receiver`."""
        self._transport = transport
        self._receiver: WeightTransport | Room | None = receiver
        self._weights = weights

    def __call__(self, group: WorkerGroup, version: int) -> None:
        """TransportError, WorkerError."""
        if self._receiver is not None:
            self._connect(group, self._receiver)
            self._receiver = None
        if not self._transport.is_collective:
            self._transport.send(self._weights, version)
            everyone(group, "load", version)
            return
        group.start("load", [(version,)] * group.size)
        failed: RuntimeError | None = None
        try:
            self._transport.send(self._weights, version)
        except RuntimeError as error:  # a receiver is gone: the group says which
            failed = error
        group.finish()
        if failed is not None:
            raise TransportError(f"weights could not be sent: {failed}") from failed

    def close(self) -> None:
        """Close the sender."""
        self._transport.close()

    def _connect(self, group: WorkerGroup, receiver: WeightTransport | Room) -> None:
        if not isinstance(receiver, Room):
            everyone(group, "connect", receiver)
            return
        group.start("join", [(receiver, rank + 1) for rank in range(group.size)])
        sender = receiver.join(0)
        group.finish()
        assert isinstance(self._transport, Announced), "made with the room"
        self._transport.inner = sender


@dataclass(frozen=True, slots=True)
class Room:
    """Where trainer (rank 0) and workers meet for a gloo group of their own; may be sent."""

    port: int
    size: int
    timeout_s: float

    def join(self, rank: int) -> Broadcast:
        """Wait for the others, then their group. TransportError when they do not come."""
        timeout = timedelta(seconds=self.timeout_s)
        try:
            store = _c10d.TCPStore(_LOOPBACK, self.port, self.size, False, timeout)
            options = _c10d.ProcessGroupGloo._Options()
            options._timeout = timeout
            options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
            return Broadcast(_c10d.ProcessGroupGloo(store, rank, self.size, options))
        except RuntimeError as error:
            raise TransportError(
                f"rank {rank} of {self.size} could not join the weights' group: {error}"
            ) from error


class Announced:
    """The sender of a room, whose group is there once the workers have come."""

    is_collective = True

    def __init__(self, workers: int, timeout_s: float) -> None:
        self.inner: Broadcast | None = None
        timeout = timedelta(seconds=timeout_s)
        self._store = _c10d.TCPStore(_LOOPBACK, 0, workers + 1, True, timeout, False)
        self.room = Room(self._store.port, workers + 1, timeout_s)

    def send(self, weights: Mapping[str, Tensor], version: int) -> None:
        """See WeightTransport."""
        assert self.inner is not None, "joined before anything is sent"
        self.inner.send(weights, version)

    def receive(self, weights: Mapping[str, Tensor], version: int) -> None:
        """See WeightTransport; the trainer sends."""
        raise TransportError("the trainer sends weights, and receives none")

    def close(self) -> None:
        """See WeightTransport."""
        self.inner = None


def carried(kind: str, weights: Mapping[str, Tensor], workers: int, timeout_s: float) -> Carried:
    """The transport of a recipe's `rollout.transport`."""
    if kind == "broadcast":
        sender = Announced(workers, timeout_s)
        return Carried(sender, sender.room, weights)
    file = SharedFile()
    return Carried(file, SharedFile(file.path), weights)
