"""Step costs: measured at the first start, kept under STERNA_HOME/stepcost.

Noise of a shared machine only adds, so the least of several runs counts, and it has to be confirmed
by a second run nearly as fast. A measurement that is not is used and kept as rough: the next start
measures again, and of both the smaller durations count. One that real steps depart from
(StepCost.departure) is thrown away when the engine closes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sterna.core.log import get_logger
from sterna.core.rundir import home, write_atomic
from sterna.engine.stepcost import CostPoint, StepCost

log = get_logger(__name__)

# Sizes timed at start. Matrix kernels change their blocking at 4 and 8 rows.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SHORT_CONTEXT, LONG_CONTEXT = 32, 1024
# All jobs are timed for LIMIT_S, at least twice; those that are not confirmed then for longer.
LIMIT_S, LONGEST_S = 1.0, 3.0
ROUNDS = 5
# A duration is confirmed by a second one within this factor. A size that took so much longer than
# a larger one was disturbed.
CONFIRMED: Final = 1.1
# Departure of real steps at which a kept measurement is thrown away.
MAX_DEPARTURE: Final = 1.5
# A size that takes longer than a larger one, again and again, may be as odd as it looks.
MAX_STARTS: Final = 4

Job = tuple[int, int]  # rows, keys


@dataclass(slots=True)
class Measured:
    """The two smallest durations of each job, and at how many starts they were taken."""

    least: dict[Job, float] = field(default_factory=dict)
    second: dict[Job, float] = field(default_factory=dict)
    num_starts: int = 1

    @property
    def is_final(self) -> bool:
        """Nothing is to be gained by another start's measurement."""
        rough = self.unconfirmed()
        is_repeated = all(self._is_repeated(job) for job in rough)
        return not rough or (is_repeated and self.num_starts >= MAX_STARTS)

    def note(self, job: Job, seconds: float) -> None:
        """Take one run."""
        seconds = max(seconds, 1e-9)
        both = sorted((seconds, self.least.get(job, seconds), self.second.get(job, float("inf"))))
        if job in self.least:
            self.second[job] = both[1]
        self.least[job] = both[0]

    def unconfirmed(self) -> list[Job]:
        """Jobs to run again."""
        return [job for job in self.least if not self._is_confirmed(job)]

    def cost(self) -> StepCost:
        """From the shortest and the longest context of each size."""
        contexts = sorted({keys for _, keys in self.least})
        short, long = contexts[0], contexts[-1]
        points: list[CostPoint] = []
        highs = self._envelope(long)
        for size, low in self._envelope(short).items():
            low = min(low, highs[size])
            per_key = (highs[size] - low) / max(long - short, 1)
            seconds = max(low - per_key * short, 0.1 * low)
            floor = points[-1].seconds if points else 0.0
            points.append(CostPoint(size, max(seconds, floor), per_key))
        return StepCost(points)

    def _envelope(self, keys: int) -> dict[int, float]:
        """Noise only adds: a step takes no longer than a larger one, which it can be padded to,
        nor than as many smaller ones as hold its rows.
        """
        found: dict[int, float] = {}
        for rows in sorted(r for r, k in self.least if k == keys):
            shared = [s * rows / other for other, s in found.items()]
            found[rows] = min(self.least[rows, keys], *shared) if shared else self.least[rows, keys]
        least = float("inf")
        for rows in reversed(found):
            least = found[rows] = min(least, found[rows])
        return found

    def _is_confirmed(self, job: Job) -> bool:
        rows, keys = job
        larger = [s for (r, k), s in self.least.items() if r > rows and k == keys]
        is_odd = any(self.least[job] > CONFIRMED * s for s in larger)
        return self._is_repeated(job) and not is_odd

    def _is_repeated(self, job: Job) -> bool:
        return self.second.get(job, float("inf")) <= CONFIRMED * self.least[job]


def measure(
    run: Callable[[int, int], None],
    max_rows: int,
    max_context: int,
    earlier: Measured | None = None,
) -> Measured:
    """Time `run(num_rows, num_keys)`: one sequence, `num_keys` cached tokens, all rows output rows.

    In rounds over all jobs, as a shared machine is slow for a second at a time. Takes about
    LIMIT_S, LONGEST_S where durations do not agree. `earlier`: those of other starts count too.
    """
    sizes = [size for size in SIZES if size <= max_rows] or [max_rows]
    long = max(0, min(LONG_CONTEXT, max_context - max(sizes)))
    jobs = [(size, keys) for size in sizes for keys in {min(SHORT_CONTEXT, long), long}]
    found = Measured()
    if earlier is not None:
        found.least = {job: earlier.least[job] for job in jobs if job in earlier.least}
        found.num_starts = earlier.num_starts + 1
    begun = time.perf_counter()
    for round_idx in range(ROUNDS):
        for job in jobs:
            if round_idx > 1 and time.perf_counter() - begun + found.least[job] > LIMIT_S:
                continue
            _time(run, job, found)
    while jobs := found.unconfirmed():
        for job in jobs:
            if time.perf_counter() - begun + found.least[job] > LONGEST_S:
                return found
            _time(run, job, found)
    return found


def load(key: str) -> Measured | None:
    """What was measured earlier under `key`, or None (also when the file is damaged)."""
    try:
        kept = json.loads(_path(key).read_text())
        found = Measured(num_starts=int(kept["num_starts"]))
        for rows, keys, least, second in kept["jobs"]:
            found.least[int(rows), int(keys)] = float(least)
            found.second[int(rows), int(keys)] = float(second)
        sizes = {rows for rows, _ in found.least}
        is_sound = 1 in sizes and all(0 < s <= found.second[j] for j, s in found.least.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if is_sound else None


def save(key: str, measured: Measured) -> None:
    """Keep a measurement. A folder that cannot be written costs a new one next time."""
    jobs = [(*job, s, measured.second.get(job, 1e9)) for job, s in measured.least.items()]
    data = {"key": key, "num_starts": measured.num_starts, "jobs": jobs}
    try:
        write_atomic(_path(key), json.dumps(data, indent=1))
    except OSError as error:
        log.warning("measured step costs are not kept: %s", error)


def tuned(key: str, run: Callable[[int, int], None], max_rows: int, max_context: int) -> StepCost:
    """The costs kept under `key`, measured now where there are none or only rough ones."""
    kept = load(key)
    origin = "measured earlier"
    if kept is None or not kept.is_final:
        origin = "measured now"
        kept = measure(run, max_rows, max_context, kept)
        save(key, kept)
    if rough := kept.unconfirmed():
        origin += f", {len(rough)} of {len(kept.least)} sizes on a busy machine"
    cost = kept.cost()
    log.info("step by output rows (%s): %s", origin, cost.line())
    return cost


def review(key: str, cost: StepCost) -> None:
    """Throw a measurement away that real steps contradict."""
    departure = cost.departure()
    if departure > MAX_DEPARTURE:
        log.info("steps of some sizes cost %.1f times what was measured; measured anew at the "
                 "next start", departure)  # fmt: skip
        _path(key).unlink(missing_ok=True)


def _time(run: Callable[[int, int], None], job: Job, found: Measured) -> None:
    start = time.perf_counter()
    run(*job)
    found.note(job, time.perf_counter() - start)


def _path(key: str) -> Path:
    name = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    return home() / "stepcost" / f"{name}.json"
