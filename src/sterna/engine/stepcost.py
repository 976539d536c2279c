"""What a step with N rows costs on this machine: measured, for the decision how much to guess.

    seconds(N, K) = level * (base[N] + per_key[N] / N * K)

N rows, all of them output rows; K is the sum over the rows of the keys each of them reads. `base`
and `per_key` are interpolated between sizes that were timed at start at a short and at a long
context; `level` follows the real steps (a busy machine, slow memory), so that estimates and real
durations can be compared. Decisions use ratios only, in which it cancels.
"""

from __future__ import annotations

import hashlib
import json
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sterna.core.log import get_logger
from sterna.core.rundir import home, write_atomic

log = get_logger(__name__)

# Sizes timed at start. Matrix kernels change their blocking at 4 and 8 rows.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SHORT_CONTEXT, LONG_CONTEXT = 32, 1024
LIMIT_S = 1.0
ROUNDS = 5
# Weight of a new step in the level, and how far one step may move it: a process that was paused
# shows a step of minutes.
LEVEL_WEIGHT, LEVEL_CLIP = 0.05, 1.5


@dataclass(frozen=True, slots=True)
class CostPoint:
    """Seconds of a step of `num_rows` rows, and what each key that its sequence holds adds."""

    num_rows: int
    seconds: float
    per_key: float = 0.0


# Before anything was measured (tests, tools): reading weights as long as computing 16 rows.
UNMEASURED = tuple(CostPoint(n, 1e-3 * (1 + n / 16)) for n in (1, 1024))


class StepCost:
    """The formula of the module's docstring. `note` is its only writer."""

    def __init__(self, points: Sequence[CostPoint] = UNMEASURED) -> None:
        self.points = tuple(points)
        self.level = 1.0
        self._base = _interpolate([(p.num_rows, p.seconds) for p in points])
        self._per_key = _interpolate([(p.num_rows, p.per_key) for p in points])

    def seconds(self, num_rows: int, num_keys: int) -> float:
        """Of a step whose rows read `num_keys` keys in all."""
        num_rows = max(num_rows, 1)
        per_row_key = _at(self._per_key, num_rows) / num_rows
        return self.level * (_at(self._base, num_rows) + per_row_key * num_keys)

    def note(self, num_rows: int, num_keys: int, seconds: float) -> None:
        """Take the duration of a real step of decodes and their drafts."""
        ratio = seconds / self.seconds(num_rows, num_keys)
        ratio = min(max(ratio, 1 / LEVEL_CLIP), LEVEL_CLIP)
        self.level *= 1 + LEVEL_WEIGHT * (ratio - 1)

    def line(self) -> str:
        """For the log."""
        return ", ".join(f"{p.num_rows}: {p.seconds * 1e3:.1f} ms" for p in self.points)


def measure_cost(run: Callable[[int, int], None], max_rows: int, max_context: int) -> StepCost:
    """Time `run(num_rows, num_keys)`: one sequence, `num_keys` cached tokens, all rows output rows.

    In rounds over all sizes for at most about LIMIT_S; the best of up to ROUNDS each, as a shared
    machine is slow for a second at a time. Costs never fall with the size: a step can be padded.
    """
    sizes = [size for size in SIZES if size <= max_rows]
    long = max(0, min(LONG_CONTEXT, max_context - max(sizes)))
    short = min(SHORT_CONTEXT, long)
    best: dict[tuple[int, int], float] = {}
    deadline = time.monotonic() + LIMIT_S
    for round_idx in range(ROUNDS):
        for job in [(size, keys) for size in sizes for keys in (short, long)]:
            if round_idx and time.monotonic() + best[job] > deadline:
                continue
            start = time.perf_counter()
            run(*job)
            seconds = max(time.perf_counter() - start, 1e-9)
            best[job] = min(best.get(job, seconds), seconds)
    return StepCost(_points(best, sizes, short, long))


def load_cost(key: str) -> StepCost | None:
    """What was measured earlier under `key`, or None (also when the file is damaged)."""
    try:
        kept = json.loads(_path(key).read_text())["points"]
        points = [
            CostPoint(int(p["num_rows"]), float(p["seconds"]), float(p["per_key"])) for p in kept
        ]
        is_sound = points[0].num_rows == 1 and all(p.seconds > 0 <= p.per_key for p in points)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return StepCost(points) if is_sound else None


def save_cost(key: str, cost: StepCost) -> None:
    """Keep a measurement. A folder that cannot be written costs a new one next time."""
    data = {"key": key, "points": [asdict(point) for point in cost.points]}
    try:
        write_atomic(_path(key), json.dumps(data, indent=1))
    except OSError as error:
        log.warning("measured step costs are not kept: %s", error)


def _path(key: str) -> Path:
    name = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    return home() / "stepcost" / f"{name}.json"


def _points(
    best: dict[tuple[int, int], float], sizes: Sequence[int], short: int, long: int
) -> list[CostPoint]:
    points: list[CostPoint] = []
    for size in sizes:
        per_key = max(0.0, best[size, long] - best[size, short]) / max(long - short, 1)
        seconds = max(best[size, short] - per_key * short, 0.1 * best[size, short])
        floor = points[-1] if points else CostPoint(0, 0.0)
        points.append(CostPoint(size, max(seconds, floor.seconds), max(per_key, floor.per_key)))
    return points


def _interpolate(pairs: Sequence[tuple[int, float]]) -> list[float]:
    """A table from 0 to the last size."""
    sizes = [size for size, _ in pairs]
    table = []
    for n in range(sizes[-1] + 1):
        i = min(max(bisect_left(sizes, n), 1), len(pairs) - 1) if len(pairs) > 1 else 0
        if i == 0 or n < sizes[0]:
            table.append(pairs[0][1])
            continue
        (low, a), (high, b) = pairs[i - 1], pairs[i]
        table.append(a + (b - a) * (n - low) / (high - low))
    return table


def _at(table: list[float], size: int) -> float:
    """Beyond the end in proportion: there arithmetic dominates."""
    return table[size] if size < len(table) else table[-1] * size / (len(table) - 1)
