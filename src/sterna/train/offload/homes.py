"""Where optimizer states and offloaded weights live, and how they come to where they are used.

A home keeps flat tensors. `walk` brings the pieces of a step, each some slices of them, in order:
in memory they are the slices themselves, elsewhere they come through two buffers:

    lane       read 0   read 1             write 0  read 2             write 1  read 3 ...
    caller              update 0 (buffer)           update 1 (buffer)           ...

so the next piece arrives, and the last one leaves, while a piece is updated. A step needs two
buffers of the largest piece (2^20 weights: 14 MB with float32 states) and not the states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sterna.core.errors import ConfigError
from sterna.train.longseq.config import Tier
from sterna.train.longseq.store import pinned
from sterna.train.offload.lanes import Lane, StreamLane, ThreadLane, Ticket
from sterna.train.offload.slab import Slab

ALIGNMENT = 64  # of tensors in a buffer: a cache line, the widest vector


class Kept(Protocol):
    """A flat tensor at home."""

    @property
    def tensor(self) -> Tensor:
        """Itself, not a copy: [size], where it lives. For checkpoints; steps use `walk`."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        ...

    def read(self, part: slice, out: Tensor) -> None:
        """out = tensor[part]."""
        ...

    def write(self, part: slice, source: Tensor) -> None:
        """tensor[part] = source."""
        ...


Piece = Mapping[str, tuple[Kept, slice]]


class Home(Protocol):
    """Keeps tensors of one tier."""

    is_apart: bool  # whether they are not where the model computes

    def new(self, size: int, dtype: torch.dtype, device: torch.device) -> Kept:
        """A tensor of zeros, used on `device`. TrainError when there is no room."""
        ...

    def walk(self, pieces: Sequence[Piece]) -> Iterator[dict[str, Tensor]]:
        """Each piece's tensors to be changed in place before the next is asked for."""
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor in memory: the device's, or pinned memory of the host."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """See Kept."""
        return self.tensor.dtype

    def read(self, part: slice, out: Tensor) -> None:
        """See Kept."""
        out.copy_(self.tensor[part], non_blocking=True)

    def write(self, part: slice, source: Tensor) -> None:
        """See Kept."""
        self.tensor[part].copy_(source, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Filed:
    """A tensor in a slab."""

    slab: Slab
    begin: int  # bytes
    size: int
    dtype: torch.dtype

    @property
    def tensor(self) -> Tensor:
        """See Kept. A new map of the file: its pages leave the process with the result."""
        return self.slab.view(self.begin, self.size * self.dtype.itemsize).view(self.dtype)

    def read(self, part: slice, out: Tensor) -> None:
        """See Kept."""
        self.slab.read(self.begin + part.start * self.dtype.itemsize, out)

    def write(self, part: slice, source: Tensor) -> None:
        """See Kept."""
        self.slab.write(self.begin + part.start * self.dtype.itemsize, source)


class MemoryHome:
    """On the device, as they are."""

    is_apart = False

    def new(self, size: int, dtype: torch.dtype, device: torch.device) -> Kept:
        """See Home."""
        return Whole(torch.zeros(size, dtype=dtype, device=device))

    def walk(self, pieces: Sequence[Piece]) -> Iterator[dict[str, Tensor]]:
        """See Home."""
        for piece in pieces:
            yield {key: kept.tensor[part] for key, (kept, part) in piece.items()}


class TierHome:
    """In a file or in pinned memory, moved on a lane through two buffers on the device."""

    is_apart = True

    def __init__(self, device: torch.device, lane: Lane, slab: Slab | None = None) -> None:
        """`slab` None: memory of the host, pinned for a GPU."""
        self.device = device
        self.lane = lane
        self._slab = slab

    def new(self, size: int, dtype: torch.dtype, device: torch.device) -> Kept:
        """See Home."""
        if self._slab is not None:
            return Filed(self._slab, self._slab.claim(size * dtype.itemsize), size, dtype)
        empty = torch.empty(size, dtype=dtype, device="meta")
        on_host = (
            pinned(empty) if self.device.type == "cuda" else torch.empty_like(empty, device="cpu")
        )
        return Whole(on_host.zero_())

    def drop(self) -> None:
        """Take back the memory that readers of `tensor` left mapped: a save, an average."""
        if self._slab is not None:
            self._slab.drop()

    def walk(self, pieces: Sequence[Piece]) -> Iterator[dict[str, Tensor]]:
        """See Home. TrainError when the disk fails."""
        size = max((num_bytes(piece) for piece in pieces), default=0)
        buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        try:
            ahead: Ticket = None
            for i in range(len(pieces) + 1):
                ticket = ahead
                if i < len(pieces):
                    ahead = self.lane.run(partial(fetch, pieces[i], cut(pieces[i], buffers[i % 2])))
                if i:
                    tensors = cut(pieces[i - 1], buffers[(i - 1) % 2])
                    self.lane.wait(ticket)
                    yield tensors
                    self.lane.run(partial(flush, pieces[i - 1], tensors))
        finally:
            self.lane.finish()


def num_bytes(piece: Piece) -> int:
    """Of a buffer for it, the gaps of alignment included."""
    return sum(_padded(kept, part) for kept, part in piece.values())


def cut(piece: Piece, buffer: Tensor) -> dict[str, Tensor]:
    """The piece's tensors inside a buffer."""
    found, at = {}, 0
    for key, (kept, part) in piece.items():
        size = (part.stop - part.start) * kept.dtype.itemsize
        found[key] = buffer[at : at + size].view(kept.dtype)
        at += _padded(kept, part)
    return found


def _padded(kept: Kept, part: slice) -> int:
    size: int = (part.stop - part.start) * kept.dtype.itemsize
    return -(-size // ALIGNMENT) * ALIGNMENT


def fetch(piece: Piece, tensors: Mapping[str, Tensor]) -> None:
    """Home -> buffer."""
    for key, (kept, part) in piece.items():
        kept.read(part, tensors[key])


def flush(piece: Piece, tensors: Mapping[str, Tensor]) -> None:
    """Buffer -> home."""
    for key, (kept, part) in piece.items():
        kept.write(part, tensors[key])


def new_home(
    tier: Tier, device: torch.device, folder: Path, setting: str = "offload.folder"
) -> Home:
    """The home of a tier; `setting` names the folder to users.

    ConfigError for host without a GPU: it is the same memory.
    """
    if tier == "memory":
        return MemoryHome()
    if tier == "disk":
        return TierHome(device, ThreadLane(), Slab(folder, setting))
    if device.type != "cuda":
        raise ConfigError(
            f"[offload] tier 'host' moves off a GPU, but the model is on {device}; use disk",
            param="offload",
        )
    return TierHome(device, StreamLane(device))
