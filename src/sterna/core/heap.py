"""Memory that a process frees and takes again at every step: kept, where the C library allows.

glibc gives blocks above 32 MB back to the system when they are freed and takes new pages for the
next one, which the kernel has to clear: a training step of SmolLM2 takes about 3 GB of activations
and logits that way. Clearing them cost a second of a step on a virtual machine (docs/log.md).
"""

from __future__ import annotations

import ctypes
import sys

# Numbers of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """From now on freed blocks of any size stay with the process. Whether the C library can.

    The peak is what it was; it is not given back between steps. Without effect outside glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))


def give_back_memory() -> None:
    """Return freed blocks to the system now, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
