"""Native draws from logits: the fast path of `engine/sampler.py`, which is its reference.

Not an op of the table: it runs on numpy rows after the forward and has no gradient. Draws agree
with the reference but where a probability lies within rounding of a border.
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


class Drawn(NamedTuple):
    """A token, -1 for a row that is not finite; its log-prob and rank are NaN and 0 there and for
    greedy draws.
    """

    token_id: int
    logprob: float  # under the distribution it was drawn from: the bits of `scores.score`
    rank: int  # 1 + the logits that are larger


def draw(logits: NDArray[np.float32], draws: Sequence[Draw]) -> list[int] | None:
    """logits [R, V] -> a token a draw, -1 for a row that is not finite.

    None when no native kernel can do it: no C++ back end, rows that are not contiguous, or a
    vocabulary beyond the kernel's scratch memory.
    """
    ids = np.empty(len(draws), np.int32)
    return ids.tolist() if _run(logits, draws, ids, None, None) else None


def draw_scored(logits: NDArray[np.float32], draws: Sequence[Draw]) -> list[Drawn] | None:
    """`draw` that also says how probable each token was, in the same walk over the row."""
    ids, ranks = np.empty(len(draws), np.int32), np.zeros(len(draws), np.int32)
    logprobs = np.full(len(draws), np.nan)
    if not _run(logits, draws, ids, logprobs, ranks):
        return None
    told = zip(ids.tolist(), logprobs.tolist(), ranks.tolist(), strict=True)
    return [Drawn(*each) for each in told]


def _run(
    logits: NDArray[np.float32],
    draws: Sequence[Draw],
    ids: NDArray[np.int32],
    logprobs: NDArray[np.float64] | None,
    ranks: NDArray[np.int32] | None,
) -> bool:
    """Whether a native kernel has filled the arrays."""
    kernels = getattr(backend_for("cpu"), "kernels", None)
    if kernels is None or not logits.flags.c_contiguous:
        return False
    from sterna.kernels import _cpu

    if logits.shape[1] > _cpu.MAX_DRAW_VOCAB:
        return False
    rows = np.array([d.row for d in draws], np.int32)
    top_k = np.array([d.top_k for d in draws], np.int32)
    floats = np.array([(d.temperature, d.top_p, d.min_p) for d in draws], np.float32).T.copy()
    uniform = np.array([d.uniform for d in draws], np.float64)
    addresses = (logits, rows, floats[0], top_k, floats[1], floats[2], uniform, ids)
    told = (0 if out is None else out.ctypes.data for out in (logprobs, ranks))
    kernels.draw(*(a.ctypes.data for a in addresses), *told, len(draws), logits.shape[1])
    return True
