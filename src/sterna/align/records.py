"""What a run writes while it works: figures, sample tables, dumps for replay, a progress bar.

metrics.jsonl    {"kind": "step", "step": 3, "reward": ..., ...}
samples.jsonl    {"step": 3, "prompt": ..., "completion": ..., "reward": ..., "advantage": ...}
rollouts/        step-00000003.safetensors: the experience that step was trained on
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sterna.align.dump import write_dump
from sterna.align.experience import Experience
from sterna.align.rlhooks import RlHook
from sterna.core.log import get_logger
from sterna.core.rundir import write_atomic
from sterna.train.metrics import read_metrics

if TYPE_CHECKING:
    from sterna.align.rltrainer import RlTrainer

_log = get_logger(__name__)
SAMPLES = "samples.jsonl"
METRICS = "metrics.jsonl"
_EVERY_S = 10.0  # between lines where there is no terminal


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """One JSON line, one write: a killed run leaves at most one torn line."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        line = json.dumps({k: _finite(v) for k, v in values.items()}, ensure_ascii=False)
        os.write(descriptor, (line + "\n").encode())
    finally:
        os.close(descriptor)


def _finite(value: Any) -> Any:
    """JSON knows no NaN: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_until(path: Path, step: int) -> None:
    """Drop what a killed run wrote after the checkpoint that is continued."""
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step and step]
        write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


class RlMetrics(RlHook):
    """Appends to metrics.jsonl of the run."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS

    def on_start(self, trainer: RlTrainer) -> None:
        """Each step is in the file once."""
        keep_until(self._path, trainer.counters.step)

    def after_step(
        self, trainer: RlTrainer, step: int, figures: Mapping[str, float], experience: Experience
    ) -> None:
        """A line."""
        append_line(self._path, {"kind": "step", "step": step, **figures})

    def on_eval(self, trainer: RlTrainer, step: int, figures: Mapping[str, float]) -> None:
        """A line."""
        append_line(self._path, {"kind": "eval", "step": step, **figures})


class Samples(RlHook):
    """The first completions of every step, with what they were worth."""

    def __init__(self, folder: Path, count: int) -> None:
        self._path = folder / SAMPLES
        self._count = count

    def on_start(self, trainer: RlTrainer) -> None:
        """As for the figures."""
        keep_until(self._path, trainer.counters.step)

    def after_step(
        self, trainer: RlTrainer, step: int, figures: Mapping[str, float], experience: Experience
    ) -> None:
        """A line a completion."""
        decode = trainer.parts.tokenizer.decode
        means = experience.layout.means(experience.advantages).tolist()
        for i, rollout in enumerate(experience.rollouts[: self._count]):
            parts = {n: float(v[i]) for n, v in experience.rewards.parts.items()}
            line = {
                "step": step,
                "prompt": decode(rollout.prompt.tolist(), False),
                "completion": decode(rollout.completion.tolist(), False),
                "reward": float(experience.scores[i]),
                "rewards": parts,
                "advantage": means[i],
                "policy_version": rollout.policy_version,
                "truncated": rollout.is_truncated,
            }
            append_line(self._path, line)


class Dump(RlHook):
    """Keeps every step's experience, so that its training can be replayed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "rollouts"

    def after_step(
        self, trainer: RlTrainer, step: int, figures: Mapping[str, float], experience: Experience
    ) -> None:
        """One file a step."""
        write_dump(self._folder / f"step-{step:08d}.safetensors", experience, figures)


class RlProgress(RlHook):
    """Step, reward, KL, length, speed and remaining time."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._said = 0.0

    def on_start(self, trainer: RlTrainer) -> None:
        """Show the bar in a terminal."""
        if not self._console.is_terminal:
            return
        columns = (TextColumn("align"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=self._console)
        total, done = trainer.recipe.run.steps, trainer.counters.step
        self._bar.add_task("", total=total, completed=done, text="")
        self._bar.start()

    def after_step(
        self, trainer: RlTrainer, step: int, figures: Mapping[str, float], experience: Experience
    ) -> None:
        """Update it."""
        text = describe(figures)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, text=text)
        elif time.monotonic() - self._said > _EVERY_S or step == trainer.recipe.run.steps:
            self._said = time.monotonic()
            _log.info("step %d/%d  %s", step, trainer.recipe.run.steps, text)

    def on_eval(self, trainer: RlTrainer, step: int, figures: Mapping[str, float]) -> None:
        """A line that stays."""
        line = f"step {step}: eval reward {figures['reward']:.4f}"
        if self._bar is not None:
            self._bar.console.print(line)
        else:
            _log.info("%s", line)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def describe(figures: Mapping[str, float]) -> str:
    """`reward 0.412  kl 0.03  length 23  1.9 s (generate 41 %)`."""
    kl = f"  kl {figures['kl']:.3f}" if "kl" in figures else ""
    share = 100 * figures["time/generate"] / figures["time/step"]
    return (
        f"reward {figures['reward']:.3f}{kl}  length {figures['completions/mean_length']:.0f}  "
        f"{figures['time/step']:.1f} s (generate {share:.0f} %)"
    )
