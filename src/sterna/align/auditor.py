"""Reward hacking: alarms when what is rewarded and what is wanted part, or completions degenerate.

    gold        over the last WINDOW steps against the WINDOW before, in deviations of the step
                means, the reward rose by more than LIMIT and the gold metric (a reward of weight 0
                named `gold`) fell by more than LIMIT
    length      the mean length has doubled or halved since the first WINDOW steps
    repetition  the share of 4-grams that a completion has had before rose by DRIFT since then
    eos         the share of completions that end by themselves fell by DRIFT since then
    alike       less than half as many of a step's token pairs are different as then
    clipped     nearly all completions end by length

Alarms follow from metrics.jsonl alone, so a resumed run and a report find the same ones. They are
kept in alarms.jsonl: {"step": 24, "kind": "gold", "text": ..., "reward": 1.4, "gold": -1.2}.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sterna.align.experience import Experience
from sterna.align.records import METRICS, append_line, keep_until
from sterna.align.rlhooks import RlHook
from sterna.core.log import get_logger
from sterna.train.metrics import read_metrics

if TYPE_CHECKING:
    from sterna.align.rltrainer import RlTrainer

_log = get_logger(__name__)
ALARMS = "alarms.jsonl"
GOLD = "rewards/gold/mean"
WINDOW = 8
LIMIT = 1.0
DRIFT = 0.25
_MIN_DEVIATION = 1e-6
_CLIPPED = 0.9
_LOOK = "look at samples.jsonl, raise algorithm.kl_coef or mend the reward"
# Metric: kind, sign of what is bad, what is said.
_DRIFTS = {
    "completions/repetition": ("repetition", 1, "of a completion's 4-grams are repeats"),
    "completions/eos_ratio": ("eos", -1, "of the completions end by themselves"),
}
_LENGTH = "completions/mean_length"
_DISTINCT = "completions/distinct_2"
_ALIKE = 0.5


@dataclass(frozen=True, slots=True)
class Alarm:
    """What was noticed after a step."""

    step: int
    kind: str
    text: str
    figures: Mapping[str, float] = field(default_factory=dict)


class Audit:
    """Follows a run's figures, step by step."""

    def __init__(self) -> None:
        self._kept: dict[str, deque[float]] = {}
        self._first: dict[str, list[float]] = {}
        self._gold_step: int | None = None
        self._ringing: set[str] = set()

    def look(self, step: int, figures: Mapping[str, Any]) -> list[Alarm]:
        """The alarms of a step; one that goes on is told once."""
        for name in ("reward", GOLD, _LENGTH, _DISTINCT, *_DRIFTS):
            if figures.get(name) is not None:
                self._keep(name, float(figures[name]))
        found = dict(self._states(figures))
        new = [Alarm(step, kind, text) for kind, text in found.items() if kind not in self._ringing]
        self._ringing = set(found)
        gold = self._gold(step)
        return new if gold is None else [*new, gold]

    def _keep(self, name: str, value: float) -> None:
        self._kept.setdefault(name, deque(maxlen=2 * WINDOW)).append(value)
        first = self._first.setdefault(name, [])
        if len(first) < WINDOW:
            first.append(value)

    def _gold(self, step: int) -> Alarm | None:
        gold = self._kept.get(GOLD, ())
        is_recent = self._gold_step is not None and step - self._gold_step < WINDOW
        if len(gold) < 2 * WINDOW or is_recent:
            return None
        rise, fall = trend(self._kept["reward"]), trend(self._kept[GOLD])
        if rise <= LIMIT or fall >= -LIMIT:
            return None
        self._gold_step = step
        return Alarm(
            step,
            "gold",
            f"the reward rises while the gold metric falls ({rise:+.1f} and {fall:+.1f} deviations "
            f"over {WINDOW} steps); the policy learns to please the reward: {_LOOK}",
            {"reward": rise, "gold": fall},
        )

    def _states(self, figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """(kind, text) of every alarm that holds at this step, but for gold's."""
        clipped = figures.get("completions/clipped_ratio") or 0.0
        if clipped > _CLIPPED:
            yield (
                "clipped",
                f"{100 * clipped:.0f} % of the completions end by length; raise "
                "rollout.max_tokens, set algorithm.missing_eos_penalty, or look at samples.jsonl",
            )
        for name, (kind, sign, what) in _DRIFTS.items():
            before, now = self._drift(name)
            if sign * (now - before) > DRIFT:
                text = f"{100 * now:.0f} % {what}, at first {100 * before:.0f} %; {_LOOK}"
                yield kind, text
        usual, distinct = self._first.get(_DISTINCT, []), figures.get(_DISTINCT, 1.0)
        if len(usual) == WINDOW and distinct < _ALIKE * statistics.mean(usual):
            yield (
                "alike",
                f"the completions become alike ({distinct:.2f} of their token pairs are different, "
                f"{statistics.mean(usual):.2f} at first); {_LOOK}",
            )
        before, now = self._drift(_LENGTH)
        if before > 0 and not before / 2 <= now <= before * 2:
            yield "length", f"completions are {now:.0f} tokens long, at first {before:.0f}; {_LOOK}"

    def _drift(self, name: str) -> tuple[float, float]:
        """Means of the first and the last WINDOW steps; equal while both overlap."""
        kept = list(self._kept.get(name, ()))
        if len(kept) < 2 * WINDOW:
            return 0.0, 0.0
        return statistics.mean(self._first[name]), statistics.mean(kept[-WINDOW:])


def audit(lines: Iterable[Mapping[str, Any]]) -> list[Alarm]:
    """All alarms of a run, from the lines of its metrics.jsonl."""
    found = Audit()
    steps = (line for line in lines if line["kind"] == "step")
    return [alarm for line in steps for alarm in found.look(line["step"], line)]


class Auditor(RlHook):
    """Tells of alarms as the run goes; `alarms` are those so far."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._audit = Audit()
        self.alarms: list[Alarm] = []

    def on_start(self, trainer: RlTrainer) -> None:
        """Take up what a resumed run had seen; the metrics hook has cut the file by now."""
        self._audit = Audit()
        self.alarms = []
        keep_until(self._folder / ALARMS, trainer.counters.step)
        for line in read_metrics(self._folder / METRICS):
            if line["kind"] == "step":
                self.alarms += self._audit.look(line["step"], line)

    def after_step(
        self, trainer: RlTrainer, step: int, figures: Mapping[str, float], experience: Experience
    ) -> None:
        """Compare, and say what is new."""
        for alarm in self._audit.look(step, figures):
            self.alarms.append(alarm)
            told = {"step": step, "kind": alarm.kind, "text": alarm.text, **alarm.figures}
            append_line(self._folder / ALARMS, told)
            _log.warning("step %d: %s", step, alarm.text)


def trend(values: deque[float]) -> float:
    """How far the newer half's mean is above the older half's, in deviations inside the halves."""
    both = list(values)
    old, new = both[: len(both) // 2], both[len(both) // 2 :]
    spread = (statistics.variance(old) + statistics.variance(new)) / 2
    rise = statistics.mean(new) - statistics.mean(old)
    return float(rise / max(spread**0.5, _MIN_DEVIATION))
