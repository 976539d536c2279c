"""One call of `sterna bench serve`: prepare the load, run it (or a sweep of it), report."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sterna.cli.bench_serve.arrivals import send_times
from sterna.cli.bench_serve.datasets import Sample, make_samples
from sterna.cli.bench_serve.drive import Driver, open_pool, wait_until_ready
from sterna.cli.bench_serve.metrics import details, summarize
from sterna.cli.bench_serve.options import LoadOptions, ReportOptions, TargetOptions
from sterna.cli.bench_serve.plot import draw_curves
from sterna.cli.bench_serve.record import Record
from sterna.cli.bench_serve.report import check_saving, describe_run, print_figures, save
from sterna.cli.bench_serve.words import TextSource, common_words, one_token_words
from sterna.core.errors import SternaError
from sterna.core.log import get_logger
from sterna.core.machine import fingerprint

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Session:
    """The settings of one call."""

    target: TargetOptions
    load: LoadOptions
    report: ReportOptions
    as_json: bool = False

    def run(self) -> list[dict[str, Any]]:
        """Measure, print and save; returns one result a run. Raises ConfigError, EndpointError."""
        check_saving(self.report)
        for reason in self.load.without_effect():
            _log.warning("%s", reason)
        self._say(f"machine: {fingerprint().line()}")
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            results = runner.run(self._measure())
        if self.report.save_result:
            self._say(f"result: {save(results, self.report)}")
        if self.report.plot is not None:
            draw_curves({results[0]["label"]: results}, self.report.plot, results[0]["model_id"])
            self._say(f"curve: {self.report.plot}")
        if self.as_json:
            print(json.dumps(results[0] if len(results) == 1 else results))
        return results

    async def _measure(self) -> list[dict[str, Any]]:
        pool = open_pool(self.target)
        model = await wait_until_ready(pool, self.target)
        words = self._words()
        try:
            results = []
            for index, load in enumerate(self._points()):
                driver = Driver(pool, self.target, load, model)
                # Texts differ between warm-up and points, so a prefix cache knows none of them.
                await driver.warm_up(self._samples(words, f"warm-up {index}"))
                samples = self._samples(words, f"point {index}")
                results.append(await self._measure_point(driver, samples, load, model))
            return results
        finally:
            pool.close()

    def _samples(self, words: tuple[str, ...], purpose: str) -> list[Sample]:
        """The load's requests: lengths by the seed alone, random texts also by `purpose`."""
        return make_samples(self.load, TextSource(words, f"{self.load.seed}/{purpose}"))

    async def _measure_point(
        self, driver: Driver, samples: list[Sample], load: LoadOptions, model: str
    ) -> dict[str, Any]:
        times = send_times(samples, load)
        with self._progress(len(samples)) as on_done:
            run = await driver.run(samples, times, load.max_concurrency, on_done)
        figures = summarize(run, self.report)
        for error in sorted({record.error for record in run.records if record.error})[:3]:
            _log.warning("failed requests: %s", error)
        if not self.as_json:
            print_figures(figures, self.report)
        result = {**describe_run(self.target, load, self.report, model), **figures}
        return {**result, **details(run.records)} if self.report.save_detailed else result

    def _points(self) -> Iterator[LoadOptions]:
        """The loads of the sweep; the one load without."""
        kind, values = self.report.sweep_points()
        for value in values:
            if kind == "concurrency":
                yield self.load.model_copy(update={"max_concurrency": int(value)})
            else:
                yield self.load.model_copy(update={"request_rate": value})
        if not values:
            yield self.load

    def _words(self) -> tuple[str, ...]:
        """One-token words of the target's vocabulary, else common ones."""
        is_made_up = self.load.dataset_name in ("random", "prefix_repetition")
        if self.load.trace_path is None and not is_made_up:
            return common_words()
        try:
            from sterna.model.hub import resolve_model
            from sterna.text.tokenizer import load_tokenizer

            return one_token_words(load_tokenizer(Path(resolve_model(self.target.tokenizer))))
        except SternaError as error:
            _log.warning("prompt lengths are approximate, for want of a tokenizer: %s", error)
            return common_words()

    def _say(self, line: str) -> None:
        if not self.as_json:
            print(line)

    @contextmanager
    def _progress(self, total: int) -> Iterator[Callable[[Record], None]]:
        console = Console(stderr=True)
        is_shown = console.is_terminal and not self.as_json
        columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        # Redrawing costs CPU that the measured server may need: twice a second is enough.
        with Progress(
            *columns, console=console, disable=not is_shown, refresh_per_second=2
        ) as progress:
            task = progress.add_task("", total=total)
            yield lambda record: progress.advance(task)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
