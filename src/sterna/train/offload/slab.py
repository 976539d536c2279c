"""One file without a name that holds tensors: gone with the process, however that ends."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sterna.core.errors import TrainError

PAGE = mmap.ALLOCATIONGRANULARITY


class Slab:
    """Claims, reads and writes spans of bytes; maps them for whoever needs a tensor.

    Reads and writes go past the process's own memory (pread, pwrite): only the system's cache
    grows, which gives way. Maps and reads see the same bytes.
    """

    def __init__(self, folder: Path, setting: str = "offload.folder") -> None:
        """`setting`: where a user says which folder."""
        self._setting = setting
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".offload-")  # noqa: SIM115
        self._folder = folder
        self._end = 0
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def claim(self, num_bytes: int) -> int:
        """Where a new span of zeros begins. TrainError when the disk has no room for it."""
        begin, size = self._end, -(-max(num_bytes, 1) // PAGE) * PAGE
        try:
            os.posix_fallocate(self._file.fileno(), begin, size)
        except OSError as error:
            raise self._error(f"{size / 2**30:.2f} GiB after {begin / 2**30:.2f}", error) from error
        self._end += size
        return begin

    def view(self, begin: int, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], the file itself."""
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        mapped = mmap.mmap(self._file.fileno(), num_bytes, offset=begin)
        self._maps.add(mapped)
        return torch.frombuffer(mapped, dtype=torch.uint8)

    def drop(self) -> None:
        """Unmap the pages that views touched; what is in them stays in the file."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def read(self, begin: int, out: Tensor) -> None:
        """Fill a contiguous tensor from the bytes at `begin`."""
        host = out if out.device.type == "cpu" else torch.empty(out.shape, dtype=out.dtype)
        view, done = _bytes(host), 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], begin + done)
            if count == 0:
                raise TrainError(f"the offload file in {self._folder} was cut short")
            done += count
        if host is not out:
            out.copy_(host)

    def write(self, begin: int, source: Tensor) -> None:
        """Put a contiguous tensor to the bytes at `begin`. TrainError for an error of the disk."""
        view, done = _bytes(source.cpu()), 0
        try:
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], begin + done)
        except OSError as error:
            raise self._error(f"{len(view) / 2**20:.1f} MiB", error) from error

    def _error(self, what: str, error: OSError) -> TrainError:
        return TrainError(
            f"offloading {what} to {self._folder} failed: {error.strerror}; free space or set "
            f"{self._setting} to another disk"
        )


def _bytes(flat: Tensor) -> memoryview:
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data)
