"""GB/s that plain reading threads get from memory: `memchr` over bytes that never match.

libc's scan is one vector load and one comparison for 64 bytes, and ctypes releases the interpreter
lock. Far more bytes than the caches hold are read, so this is what memory gives to loads.
"""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BYTES_A_THREAD = 384 << 20
_ABSENT = 255


class StreamReader:
    """Owns a buffer a thread and the threads."""

    def __init__(self, threads: int) -> None:
        self._buffers = [np.ones(BYTES_A_THREAD, np.uint8) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads)
        self._scan = ctypes.CDLL(None).memchr
        self._scan.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
        self._scan.restype = ctypes.c_void_p

    def gbs(self) -> float:
        """One pass of all threads over their buffers."""
        started = time.perf_counter()
        found = list(self._pool.map(self._pass, self._buffers))
        seconds = time.perf_counter() - started
        assert found == [None] * len(found), "the byte that is in no buffer was found"
        return len(self._buffers) * BYTES_A_THREAD / seconds / 1e9

    def _pass(self, buffer: np.ndarray) -> int | None:
        at: int | None = self._scan(buffer.ctypes.data, _ABSENT, buffer.nbytes)
        return at
