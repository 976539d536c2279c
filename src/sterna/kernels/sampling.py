"""Log-sums of rows, and native draws from logits: the fast path of `engine/sampler.py`.

Not ops of the table: they run on numpy rows after the forward and have no gradient. Draws agree
with `engine/sampler.py`, their reference, but where a probability lies within rounding of a border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sterna.kernels.backend import backend_for


@dataclass(frozen=True, slots=True)
class Draw:
    """One draw from row `row`: temperature below 1e-5 is greedy, top_k 0 is off."""

    row: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float  # in [0, 1)


class LogSum(NamedTuple):
    """The log-sum-exp of a row of logits z [V], and what it was made of."""

    value: float  # log of sum exp z: a log-prob is z[token] - value
    below: NDArray[np.float32]  # z - max
    weights: NDArray[np.float32]  # exp(z - max)
    total: np.float64  # their sum


def log_sum(row: NDArray[np.float32]) -> LogSum:
    """float32 exp, a float64 sum: the one place that sampler and training take log-probs from.

    That is why both have the same bits.
    """
    top = row.max()
    below = row - top
    weights = np.exp(below)
    total = weights.sum(dtype=np.float64)
    return LogSum(float(top) + float(np.log(total)), below, weights, total)


def draw(logits: NDArray[np.float32], draws: Sequence[Draw]) -> list[int] | None:
    """logits [R, V] -> a token a draw, -1 for a row that is not finite.

    None when no native kernel can do it: no C++ back end, rows that are not contiguous, or a
    vocabulary beyond the kernel's scratch memory.
    """
    kernels = getattr(backend_for("cpu"), "kernels", None)
    if kernels is None or not logits.flags.c_contiguous:
        return None
    from sterna.kernels import _cpu

    if logits.shape[1] > _cpu.MAX_DRAW_VOCAB:
        return None
    rows = np.array([d.row for d in draws], np.int32)
    top_k = np.array([d.top_k for d in draws], np.int32)
    floats = np.array([(d.temperature, d.top_p, d.min_p) for d in draws], np.float32).T.copy()
    uniform = np.array([d.uniform for d in draws], np.float64)
    ids = np.empty(len(draws), np.int32)
    addresses = (logits, rows, floats[0], top_k, floats[1], floats[2], uniform, ids)
    kernels.draw(*(a.ctypes.data for a in addresses), len(draws), logits.shape[1])
    found: list[int] = ids.tolist()
    return found
