"""Cycles and instructions of the calling thread, where the kernel hands out hardware counters.

`perf_event_open` by ctypes (man 2 perf_event_open). Kernel threads of the pool are not counted, so
run with one thread. Virtual machines often have no counters: `open_counters` then says why.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass

_SYSCALLS = {"x86_64": 298, "aarch64": 241}
_HARDWARE, _CYCLES, _INSTRUCTIONS = 0, 0, 1
_ATTR_BYTES = 112
_EXCLUDE_KERNEL_AND_HYPERVISOR = 1 << 5 | 1 << 6


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one stretch of code."""

    cycles: int
    instructions: int

    @property
    def ipc(self) -> float:
        """Instructions a cycle."""
        return self.instructions / max(self.cycles, 1)

    def since(self, before: Counts) -> Counts:
        """What came after `before`."""
        return Counts(self.cycles - before.cycles, self.instructions - before.instructions)


class Counters:
    """Two open counters; read before and after."""

    def __init__(self, files: tuple[int, int]) -> None:
        self._files = files

    def read(self) -> Counts:
        """Since the counters were opened."""
        cycles, instructions = (struct.unpack("q", os.read(f, 8))[0] for f in self._files)
        return Counts(cycles, instructions)


def open_counters() -> Counters | str:
    """Counters of this thread, or the reason why there are none."""
    number = _SYSCALLS.get(platform.machine())
    if number is None or platform.system() != "Linux":
        return f"perf counters: not known for {platform.system()} {platform.machine()}"
    libc = ctypes.CDLL(None, use_errno=True)
    files = []
    for event in (_CYCLES, _INSTRUCTIONS):
        fields = struct.pack("IIQQQQQ", _HARDWARE, _ATTR_BYTES, event, 0, 0, 0,
                             _EXCLUDE_KERNEL_AND_HYPERVISOR)  # fmt: skip
        attributes = ctypes.create_string_buffer(fields, _ATTR_BYTES)
        file = libc.syscall(number, attributes, 0, -1, -1, 0)
        if file < 0:
            code = ctypes.get_errno()
            name = errno.errorcode.get(code, str(code))
            return f"perf counters: not available ({name}, {os.strerror(code)})"
        files.append(file)
    return Counters((files[0], files[1]))
