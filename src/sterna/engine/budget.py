"""The token budget: measured, not guessed.

A forward's time grows slowly with its tokens as long as reading the weights dominates, and in
proportion once arithmetic does. Beyond that knee a larger step adds latency and no throughput
(FastGen, arXiv 2401.08671, section 3.2). So a few step sizes are timed at start and the smallest
within 5% of the best tokens/s is the budget; the largest within 10% is that of steps that delay no
decode.
The result is kept under STERNA_HOME, by machine, model, dtype, threads and kernels, until a start
finds that the machine was busy then; the lesser times of both measurements count from there on.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from sterna.core.log import get_logger
from sterna.core.rundir import home, write_atomic
from sterna.engine.scheduler import MAX_DECODE_SHARE

log = get_logger(__name__)

SIZES = (32, 64, 128, 256, 512, 1024)
# All timing together; a size is skipped when it would not fit. Only the first start pays for it.
LIMIT_S = 1.0
ROUNDS = 4
NEAR_BEST = 0.95
# The curve knows nothing of earlier keys, which wide chunks of long prompts walk less often.
NEAR_BEST_IDLE = 0.9
# After two sizes without a gain of 2% larger ones are not tried.
PATIENCE, GAIN = 2, 1.02
# A kept curve was measured on a busy machine if its smallest size now takes less than this share.
CONTRADICTED, LOOKS = 0.8, 2


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a forward of one prompt chunk of `num_tokens` tokens."""

    num_tokens: int
    seconds: float

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.num_tokens / self.seconds


@dataclass(frozen=True, slots=True)
class StepCurve:
    """Measured step times, by size."""

    points: tuple[StepTime, ...]

    @property
    def best_speed(self) -> float:
        """Most tokens a second of any size."""
        return max(point.speed for point in self.points)

    def knee(self) -> int:
        """The smallest size within 5% of the best speed."""
        return min(self._near_best(NEAR_BEST))

    def widest(self) -> int:
        """The largest size within 10% of the best speed."""
        return max(self._near_best(NEAR_BEST_IDLE))

    def _near_best(self, share: float) -> list[int]:
        good = share * self.best_speed
        return [point.num_tokens for point in self.points if point.speed >= good]

    def line(self) -> str:
        """For the log."""
        return ", ".join(f"{p.num_tokens}: {p.seconds * 1e3:.1f} ms" for p in self.points)

    def is_contradicted(self, run: Callable[[int], None]) -> bool:
        """Was the machine busy when this was measured? LOOKS runs of the smallest size tell."""
        first = self.points[0]
        now = min(_time(run, first.num_tokens) for _ in range(LOOKS))
        return now < CONTRADICTED * first.seconds

    def merged(self, other: StepCurve) -> StepCurve:
        """The lesser time of every size either has."""
        best: dict[int, float] = {}
        for point in (*self.points, *other.points):
            best[point.num_tokens] = min(point.seconds, best.get(point.num_tokens, math.inf))
        return StepCurve(tuple(_points(dict(sorted(best.items())))))


def choose_budget(curve: StepCurve, max_num_seqs: int) -> int:
    """The knee, or what a full batch of decodes needs with a share left for prompts."""
    return max(curve.knee(), least_budget(max_num_seqs))


def least_budget(max_num_seqs: int) -> int:
    """The smallest budget at which `max_num_seqs` sequences may run."""
    return math.ceil(max_num_seqs / MAX_DECODE_SHARE)


def measure_curve(run: Callable[[int], None], max_tokens: int) -> StepCurve:
    """Time `run(num_tokens)` for at most about LIMIT_S seconds; the best of up to ROUNDS each.

    In rounds over all sizes, because a shared machine is slow for a second at a time: timed one
    size after the other, the curve would show the neighbours.
    """
    best: dict[int, float] = {}
    deadline = time.monotonic() + LIMIT_S
    for size in [size for size in SIZES if size <= max_tokens] or [max_tokens]:
        points = _points(best)
        if points and (_has_peaked(points) or _too_slow(points[-1], size, deadline)):
            break
        best[size] = _time(run, size)
    for size in [size for _ in range(ROUNDS - 1) for size in best]:
        if time.monotonic() + best[size] < deadline:
            best[size] = min(best[size], _time(run, size))
    return StepCurve(tuple(_points(best)))


def _points(best: dict[int, float]) -> list[StepTime]:
    return [StepTime(size, seconds) for size, seconds in best.items()]


def load_curve(key: str) -> StepCurve | None:
    """A curve kept earlier under `key`, or None (also when the file is damaged)."""
    try:
        kept = json.loads(_path(key).read_text())
        points = tuple(StepTime(int(p["num_tokens"]), float(p["seconds"])) for p in kept["points"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_sound = bool(points) and all(p.num_tokens > 0 and p.seconds > 0 for p in points)
    return StepCurve(points) if is_sound else None


def save_curve(key: str, curve: StepCurve) -> None:
    """Keep a curve. A folder that cannot be written costs a new measurement next time."""
    data = {"key": key, "points": [asdict(point) for point in curve.points]}
    try:
        write_atomic(_path(key), json.dumps(data, indent=1))
    except OSError as error:
        log.warning("measured step times are not kept: %s", error)


def _path(key: str) -> Path:
    name = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    return home() / "budget" / f"{name}.json"


def _time(run: Callable[[int], None], size: int) -> float:
    start = time.perf_counter()
    run(size)
    return max(time.perf_counter() - start, 1e-9)


def _has_peaked(points: list[StepTime]) -> bool:
    if len(points) <= PATIENCE:
        return False
    before = max(point.speed for point in points[:-PATIENCE])
    return max(point.speed for point in points[-PATIENCE:]) < before * GAIN


def _too_slow(last: StepTime, size: int, deadline: float) -> bool:
    """Two runs of `size` at the last size's speed would pass the deadline."""
    return time.monotonic() + 2 * size / last.speed > deadline
