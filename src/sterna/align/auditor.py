"""Reward hacking: an alarm when what is rewarded rises and what is wanted does not.

The gold metric is a reward of weight 0 named `gold`. Over the last WINDOW steps against the WINDOW
before, in units of the deviation of the step means, the alarm goes off when the reward rose by more
than LIMIT and gold fell by more than LIMIT. Completions that all become alike or run into the
length limit are warned of in the same way.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sterna.align.experience import Experience
from sterna.align.records import METRICS, append_line
from sterna.align.rlhooks import RlHook
from sterna.core.log import get_logger
from sterna.train.metrics import read_metrics

if TYPE_CHECKING:
    from sterna.align.rltrainer import RlTrainer

_log = get_logger(__name__)
GOLD = "rewards/gold/mean"
WINDOW = 8
LIMIT = 1.0
_MIN_DEVIATION = 1e-6
_CLIPPED = 0.9
_ALIKE = 0.5
_DISTINCT = "completions/distinct_2"


class Auditor(RlHook):
    """Keeps the last step means and says when they part; `alarms` are the steps that did."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS
        self._kept: dict[str, deque[float]] = {
            name: deque(maxlen=2 * WINDOW) for name in ("reward", GOLD)
        }
        self._first_distinct: list[float] = []
        self.alarms: list[int] = []
        self._was_clipped = False
        self._was_alike = False

    def on_start(self, trainer: RlTrainer) -> None:
        """A resumed run remembers its steps, which metrics.jsonl has."""
        for line in read_metrics(self._path):
            if line["kind"] == "alarm":
                self.alarms.append(line["step"])
            elif line["kind"] == "step":
                self._keep(line)

    def after_step(
        self, trainer: RlTrainer, step: int, figures: Mapping[str, float], experience: Experience
    ) -> None:
        """Compare; an alarm is given once in a window."""
        self._keep(figures)
        self._note_length(step, figures)
        self._note_alike(step, figures)
        if len(self._kept[GOLD]) < 2 * WINDOW or (self.alarms and step - self.alarms[-1] < WINDOW):
            return
        rise, fall = trend(self._kept["reward"]), trend(self._kept[GOLD])
        if rise > LIMIT and fall < -LIMIT:
            self._alarm(step, rise, fall)

    def _keep(self, figures: Mapping[str, float]) -> None:
        if len(self._first_distinct) < WINDOW and _DISTINCT in figures:
            self._first_distinct.append(figures[_DISTINCT])
        if GOLD in figures:
            for name, kept in self._kept.items():
                kept.append(figures[name])

    def _alarm(self, step: int, rise: float, fall: float) -> None:
        self.alarms.append(step)
        append_line(self._path, {"kind": "alarm", "step": step, "reward": rise, "gold": fall})
        _log.warning(
            "step %d: the reward rises while the gold metric falls (%+.1f and %+.1f deviations "
            "over %d steps); the policy is learning to please the reward. Look at samples.jsonl, "
            "raise algorithm.kl_coef or mend the reward",
            step, rise, fall, WINDOW,
        )  # fmt: skip

    def _note_length(self, step: int, figures: Mapping[str, float]) -> None:
        is_clipped = figures["completions/clipped_ratio"] > _CLIPPED
        if is_clipped and not self._was_clipped:
            _log.warning(
                "step %d: %.0f %% of the completions end by length; raise rollout.max_tokens, set "
                "algorithm.missing_eos_penalty, or look at samples.jsonl",
                step, 100 * figures["completions/clipped_ratio"],
            )  # fmt: skip
        self._was_clipped = is_clipped

    def _note_alike(self, step: int, figures: Mapping[str, float]) -> None:
        if len(self._first_distinct) < WINDOW:
            return
        usual = statistics.mean(self._first_distinct)
        is_alike = figures[_DISTINCT] < _ALIKE * usual
        if is_alike and not self._was_alike:
            _log.warning(
                "step %d: the completions become alike (%.2f of their token pairs are different, "
                "%.2f at first); look at samples.jsonl, raise algorithm.kl_coef or entropy_coef",
                step, figures[_DISTINCT], usual,
            )  # fmt: skip
        self._was_alike = is_alike


def trend(values: deque[float]) -> float:
    """How far the newer half's mean is above the older half's, in deviations inside the halves."""
    both = list(values)
    old, new = both[: len(both) // 2], both[len(both) // 2 :]
    spread = (statistics.variance(old) + statistics.variance(new)) / 2
    rise = statistics.mean(new) - statistics.mean(old)
    return float(rise / max(spread**0.5, _MIN_DEVIATION))
