"""Memory that is given back while its tensor stays where it is."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

# Linux; elsewhere nothing is given back, which is slower to notice but never wrong.
_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)


def discard(tensor: Tensor) -> int:
    """Drop the content of a contiguous tensor that nobody needs; returns the bytes given back.

    On a CPU whole pages go back to the system and read as zeros, taken again at the first write:
    recorded steps keep their addresses. On a CUDA device the storage is freed, see `restore`.
    """
    assert tensor.is_contiguous(), "parts of a tensor share pages with the rest"
    if tensor.device.type == "cuda":
        num_bytes = tensor.untyped_storage().nbytes()
        tensor.untyped_storage().resize_(0)
        return num_bytes
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    size = (tensor.data_ptr() + tensor.nbytes) // page * page - first
    tensor.zero_() if size <= 0 or _DONTNEED is None else _advise(first, size)
    return max(size, 0)


def restore(tensor: Tensor) -> None:
    """Make a discarded tensor usable again; its content is zeros."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0 and tensor.numel():
        storage.resize_(int(tensor.storage_offset() + tensor.numel()) * tensor.element_size())
        tensor.zero_()


def _advise(address: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise")
