"""Log-probabilities of tokens under the distribution that they are drawn from.

    z = logits / temperature                  of the tokens that top_k, min_p and top_p leave
    log p = z_y - log sum exp z               entropy = log sum exp z - sum p z

One function for the sampler and for training, so that a rollout's log-probs and the trainer's are
the same bits wherever their logits are. Natively on all threads where that is possible; the
reference says the same within rounding (sums in another order).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sterna.kernels.backend import backend_for


class Distribution(NamedTuple):
    """What a token is drawn from; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


PLAIN = Distribution()


@dataclass(frozen=True, slots=True)
class Scores:
    """Of R rows."""

    logprobs: NDArray[np.float64]  # [R]; -inf where the token was left out, NaN for a broken row
    entropies: NDArray[np.float64]  # [R]
    log_sums: NDArray[np.float64]  # [R]: log sum exp(z - max z)
    probs: NDArray[np.float32] | None = None  # [R, V], 0 where a token was left out


def score(
    logits: NDArray[np.float32],
    chosen: NDArray[np.int32],
    distributions: Sequence[Distribution],
    wants_probs: bool = False,
) -> Scores:
    """logits [R, V], chosen [R], a distribution a row (or one for all).

    With `wants_probs` the rows of `logits` are overwritten by the probabilities, which saves their
    memory. The temperature must be positive.
    """
    assert all(d.temperature > 0 for d in distributions), "greedy rows have no distribution"
    found = _native(logits, chosen, distributions, wants_probs)
    return reference_score(logits, chosen, distributions, wants_probs) if found is None else found


def _native(
    logits: NDArray[np.float32],
    chosen: NDArray[np.int32],
    distributions: Sequence[Distribution],
    wants_probs: bool,
) -> Scores | None:
    kernels = getattr(backend_for("cpu"), "kernels", None)
    if kernels is None or not logits.flags.c_contiguous:
        return None
    from sterna.kernels import _cpu

    count, vocab = logits.shape
    if vocab > _cpu.MAX_DRAW_VOCAB:
        return None
    rows, ids = np.arange(count, dtype=np.int32), np.ascontiguousarray(chosen, np.int32)
    columns = np.broadcast_to(np.array(distributions, np.float64), (count, 4))
    floats = np.ascontiguousarray(columns[:, [0, 2, 3]].T, np.float32)
    top_k = columns[:, 1].astype(np.int32)
    out = np.empty((3, count))
    addresses = (logits, rows, ids, floats[0], top_k, floats[1], floats[2], *out)
    probs = logits.ctypes.data if wants_probs else 0
    kernels.score(*(a.ctypes.data for a in addresses), probs, count, vocab)
    return Scores(out[0], out[1], out[2], logits if wants_probs else None)


def reference_score(
    logits: NDArray[np.float32],
    chosen: NDArray[np.int32],
    distributions: Sequence[Distribution],
    wants_probs: bool = False,
) -> Scores:
    """`score` in numpy, row by row."""
    each = list(distributions) * (len(logits) if len(distributions) == 1 else 1)
    out = np.empty((3, len(logits)))
    for i, (row, token, distribution) in enumerate(zip(logits, chosen, each, strict=True)):
        p, z = weights(row, distribution)
        total = p.sum(dtype=np.float64)
        is_kept = p > 0
        weighted = np.dot(p[is_kept], z[is_kept])
        log_sum = np.log(total)
        logprob = float(z[token]) - log_sum if is_kept[token] else -np.inf
        out[:, i] = logprob, log_sum - float(weighted) / total, log_sum
        if wants_probs:
            row[:] = p / total
    return Scores(out[0], out[1], out[2], logits if wants_probs else None)


def weights(
    row: NDArray[np.float32], distribution: Distribution
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(unnormalised probabilities [V], 0 where left out; z less its maximum [V]) of one row."""
    z = (row - row.max()) / np.float32(distribution.temperature)
    p = np.exp(z)
    if 0 < distribution.top_k < len(row):
        p[np.argsort(-p, kind="stable")[distribution.top_k :]] = 0
    if distribution.min_p > 0:
        p[p < np.float32(distribution.min_p)] = 0
    if distribution.top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order], dtype=np.float64) - p[order]
        kept = max(1, int(np.count_nonzero(before < distribution.top_p * p.sum(dtype=np.float64))))
        p[order[kept:]] = 0
    return p, z
