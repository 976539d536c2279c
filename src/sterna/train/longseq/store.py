"""Where the checkpoints of a step wait for the backward: memory, pinned host memory or a file.

Checkpoints are taken in the reverse order in which they were put, so a slot of the slab is the
checkpoint's number and the next one to be read is known: it is fetched ahead. Slots have one exact
size, that of the largest checkpoint so far: allocators that round to powers of two would waste up
to half (600,000 tokens of Llama-8B are 4.6 GiB a layer, 8 GiB when rounded).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sterna.core.errors import TrainError

Kept = Any


class Store(Protocol):
    """Keeps tensors from the forward to the backward."""

    def put(self, tensor: Tensor) -> Kept:
        """Keep it; the result is what `take` wants."""
        ...

    def take(self, kept: Kept) -> Tensor:
        """The tensor again, which the store forgets."""
        ...


class MemoryStore:
    """On the device, as they are."""

    def put(self, tensor: Tensor) -> Kept:
        """See Store."""
        return tensor

    def take(self, kept: Kept) -> Tensor:
        """See Store."""
        tensor: Tensor = kept
        return tensor


class DiskStore:
    """In an unlinked file of `folder`: gone with the process, however that ends."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".activations-")  # noqa: SIM115
        self._folder = folder
        self._ends = [0]  # where each checkpoint of the step ends

    def put(self, tensor: Tensor) -> Kept:
        """See Store. TrainError when the disk is full."""
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        begin = self._ends[-1]
        data = _bytes(flat.cpu())
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file.fileno(), data[written:], begin + written)
        except OSError as error:
            raise TrainError(
                f"a checkpoint of {len(data) / 2**30:.2f} GiB, after {begin / 2**30:.2f}, does not "
                f"fit into {self._folder}: {error.strerror}; free space or set longseq.folder"
            ) from error
        self._ends.append(begin + len(data))
        return begin, tensor.shape, tensor.dtype, tensor.device

    def take(self, kept: Kept) -> Tensor:
        """See Store."""
        begin, shape, dtype, device = kept
        size = shape.numel() * dtype.itemsize
        flat = torch.empty(size, dtype=torch.uint8)
        view = _bytes(flat)
        read = 0
        while read < size:
            count = os.preadv(self._file.fileno(), [view[read:]], begin + read)
            if count == 0:
                raise TrainError(f"the checkpoint file in {self._folder} was cut short")
            read += count
        self._forget(begin, size)
        return flat.view(dtype).view(shape).to(device)

    def _forget(self, begin: int, size: int) -> None:
        while len(self._ends) > 1 and self._ends[-1] > begin:
            self._ends.pop()
        os.posix_fadvise(self._file.fileno(), max(0, begin - size), size, os.POSIX_FADV_WILLNEED)


class HostStore:
    """In pinned host memory, copied on a stream of its own while the GPU computes.

    The slab is registered once; a slot is reused in the next step, whose copies wait for this
    step's reads because both are on the one side stream. Not run on a GPU so far.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise TrainError(
                f"longseq.tier = 'host' moves checkpoints off a GPU, but the model is on {device}; "
                "use memory or disk"
            )
        self._cuda: Any = torch.cuda  # its classes are untyped
        self._stream = self._cuda.Stream(device)
        self._device = device
        self._slots: list[Tensor] = []
        self._ready: dict[int, tuple[Tensor, Any]] = {}
        self._count = 0

    def put(self, tensor: Tensor) -> Kept:
        """See Store."""
        slot, self._count = self._count, self._count + 1
        host = self._slot(slot, tensor)
        written = self._cuda.Event()
        written.record(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(written)
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self._stream)
        return slot

    def take(self, kept: Kept) -> Tensor:
        """See Store. Asks for the one before, which the backward needs next."""
        slot: int = kept
        tensor, arrived = self._ready.pop(slot) if slot in self._ready else self._fetch(slot)
        torch.cuda.current_stream(self._device).wait_event(arrived)
        self._count = slot
        if slot > 0 and slot - 1 not in self._ready:
            self._ready[slot - 1] = self._fetch(slot - 1)
        tensor.record_stream(torch.cuda.current_stream(self._device))
        return tensor

    def _fetch(self, slot: int) -> tuple[Tensor, Any]:
        with torch.cuda.stream(self._stream):
            tensor = self._slots[slot].to(self._device, non_blocking=True)
            arrived = self._cuda.Event()
            arrived.record(self._stream)
        return tensor, arrived

    def _slot(self, slot: int, like: Tensor) -> Tensor:
        if slot == len(self._slots):
            self._slots.append(pinned(like))
        if self._slots[slot].shape != like.shape or self._slots[slot].dtype != like.dtype:
            self._stream.synchronize()  # the old slot may still be read
            self._slots[slot] = pinned(like)
        return self._slots[slot]


def _bytes(flat: Tensor) -> memoryview:
    data: Any = flat.numpy()
    return memoryview(data)


def pinned(like: Tensor) -> Tensor:
    """Page-locked memory of exactly this size."""
    plain = torch.empty(like.shape, dtype=like.dtype)
    cuda: Any = torch.cuda
    result = cuda.cudart().cudaHostRegister(plain.data_ptr(), plain.nbytes, 0)
    if int(result) != 0:
        raise TrainError(
            f"{plain.nbytes / 2**30:.2f} GiB of host memory cannot be pinned (CUDA error "
            f"{int(result)}); raise the memlock limit or use longseq.tier = 'disk'"
        )
    return plain
