"""What a run shows while it works: a live bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sterna.core.log import get_logger
from sterna.train.hooks import EvalStats, Hook, StepStats
from sterna.train.metrics import step_figures

if TYPE_CHECKING:
    from sterna.train.trainer import Trainer

_log = get_logger(__name__)
_EVERY_S = 10.0  # between lines where there is no terminal


class ProgressBar(Hook):
    """Step, loss, tokens/s, MFU, memory and remaining time. The main rank only."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._said = 0.0

    def on_start(self, trainer: Trainer) -> None:
        """Show the bar."""
        if not self._console.is_terminal:
            return
        columns = (TextColumn("train"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
        text = TextColumn("{task.fields[text]}")
        self._bar = Progress(*columns, text, console=self._console)
        self._bar.add_task(
            "", total=trainer.recipe.run.steps, completed=trainer.counters.step, text=""
        )
        self._bar.start()

    def after_step(self, trainer: Trainer, stats: StepStats) -> None:
        """Update it."""
        text = describe(step_figures(trainer, stats))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=stats.step, text=text)
        elif time.monotonic() - self._said > _EVERY_S or stats.step == trainer.recipe.run.steps:
            self._said = time.monotonic()
            left = (trainer.recipe.run.steps - stats.step) * stats.seconds
            _log.info("step %d/%d  %s  %s left", stats.step, trainer.recipe.run.steps, text,
                      duration(left))  # fmt: skip

    def on_eval(self, trainer: Trainer, stats: EvalStats) -> None:
        """A line that stays."""
        mark = " (best)" if stats.is_best else ""
        line = f"step {stats.step}: eval loss {stats.loss:.4f}{mark}"
        if self._bar is not None:
            self._bar.console.print(line)
        else:
            _log.info("%s", line)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def describe(figures: dict[str, float]) -> str:
    """`loss 2.1034  1,234 tok/s  MFU 41 %  2.3 GiB`."""
    return (
        f"loss {figures['loss']:.4f}  {figures['tokens_per_s']:,.0f} tok/s  "
        f"MFU {100 * figures['mfu']:.0f} %  {figures['memory_gib']:.1f} GiB"
    )


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
