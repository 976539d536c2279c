"""Work on runs of rows by plain threads, each with single-threaded PyTorch ops.

PyTorch's own threads meet at a barrier after every op. On a machine with other busy processes a
barrier costs time slices: quantising 135M weights took 118 s beside one busy process where it
takes 6 s alone. Threads that share nothing lose only what the other process takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from sterna.core.machine import num_usable_cpus

T = TypeVar("T")
R = TypeVar("R")


def map_runs(function: Callable[[T], R], runs: Iterable[T]) -> list[R]:
    """`[function(run) for run in runs]` on all CPUs; PyTorch releases the GIL inside ops."""
    with single_threaded_ops(), ThreadPoolExecutor(num_usable_cpus()) as pool:
        return list(pool.map(function, runs))


@contextlib.contextmanager
def single_threaded_ops() -> Iterator[None]:
    """PyTorch on one thread an op, in this thread and those started within."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
