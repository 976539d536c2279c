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
from typing import TYPE_CHECKING

from sterna.align.experience import Experience
from sterna.align.rlhooks import RlHook
from sterna.core.log import get_logger

if TYPE_CHECKING:
    from sterna.align.rltrainer import RlTrainer

_log = get_logger(__name__)
GOLD = "rewards/gold/mean"
WINDOW = 8
LIMIT = 1.0
_MIN_DEVIATION = 1e-6
_CLIPPED = 0.9


class Auditor(RlHook):
    """Keeps the last step means and says when they part; `alarms` are the steps that did."""

    def __init__(self) -> None:
        self._kept: dict[str, deque[float]] = {
            name: deque(maxlen=2 * WINDOW) for name in ("reward", GOLD)
        }
        self.alarms: list[int] = []
        self._was_clipped = False

    def after_step(
        self, trainer: RlTrainer, step: int, figures: Mapping[str, float], experience: Experience
    ) -> None:
        """Compare; an alarm is logged once in a window."""
        self._note_length(step, figures)
        if GOLD not in figures:
            return
        for name, kept in self._kept.items():
            kept.append(figures[name])
        if len(self._kept[GOLD]) < 2 * WINDOW or (self.alarms and step - self.alarms[-1] < WINDOW):
            return
        rise, fall = trend(self._kept["reward"]), trend(self._kept[GOLD])
        if rise > LIMIT and fall < -LIMIT:
            self.alarms.append(step)
            _log.warning(
                "step %d: the reward rises while the gold metric falls (%+.1f and %+.1f deviations "
                "over %d steps); the policy is learning to please the reward. Look at "
                "samples.jsonl, raise algorithm.kl_coef or mend the reward",
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


def trend(values: deque[float]) -> float:
    """How far the newer half's mean is above the older half's, in deviations inside the halves."""
    both = list(values)
    old, new = both[: len(both) // 2], both[len(both) // 2 :]
    spread = (statistics.variance(old) + statistics.variance(new)) / 2
    rise = statistics.mean(new) - statistics.mean(old)
    return float(rise / max(spread**0.5, _MIN_DEVIATION))
