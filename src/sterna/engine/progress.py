"""A progress bar for offline runs that appears only when the work takes a while."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sterna.engine.request import RequestOutput

# Below this a bar would only flicker.
SHOW_AFTER_S = 2.0


class StepProgress:
    """Counts finished requests and tokens a second. Draws nothing when `is_shown` is False."""

    def __init__(self, num_requests: int, console: Console, is_shown: bool) -> None:
        self._started = time.monotonic()
        self._is_shown = is_shown
        self._num_requests = num_requests
        self._num_finished = 0
        self._num_tokens = 0
        self._console = console
        self._bar: Progress | None = None

    def update(self, outputs: Sequence[RequestOutput]) -> None:
        """Take a step's outputs."""
        self._num_finished += sum(output.is_finished for output in outputs)
        self._num_tokens += sum(len(d.token_ids) for output in outputs for d in output.deltas)
        elapsed = time.monotonic() - self._started
        if self._is_shown and elapsed > SHOW_AFTER_S:
            speed = f"{self._num_tokens / elapsed:,.0f} tok/s"
            bar = self._bar = self._bar or self._start()
            bar.update(bar.task_ids[0], completed=self._num_finished, speed=speed)

    def close(self) -> None:
        """Leave the finished bar on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def _start(self) -> Progress:
        columns = (TextColumn("generate"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bar = Progress(*columns, TextColumn("{task.fields[speed]}"), console=self._console)
        bar.add_task("generate", total=self._num_requests, speed="")
        bar.start()
        return bar


@contextmanager
def counting(
    total: int | None, what: str, is_shown: bool | None
) -> Iterator[Callable[[int], None]]:
    """A bar of items done, drawn after 2 s; call what it yields with the items of each step.

    is_shown None: when stderr is a terminal.
    """
    console, started, done = Console(stderr=True), time.monotonic(), 0
    shown = sys.stderr.isatty() if is_shown is None else is_shown
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TextColumn("{task.fields[speed]}"), console=console)
    task = bar.add_task(what, total=total, speed="")

    def note(count: int) -> None:
        nonlocal done
        done += count
        elapsed = time.monotonic() - started
        if shown and elapsed > SHOW_AFTER_S:
            bar.start()
            bar.update(task, completed=done, speed=f"{done / elapsed:,.0f}/s")

    try:
        yield note
    finally:
        bar.stop()
