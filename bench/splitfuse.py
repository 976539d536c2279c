"""Dynamic SplitFuse against whole prompts: long prompts arriving among decoding streams.

    python bench/splitfuse.py [--rates 0.25,0.5,1.0] [--seconds 30]

Eight streams decode all the time (50-token prompts, 128 new tokens, the next begins when one
ends). Prompts of 1,500 tokens (64 new) arrive by a Poisson process. Both policies get the same
requests at the same times, rate by rate in turn, in one process without a server between. Writes
bench/results/splitfuse-DATE.json and docs/img/splitfuse.png.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sterna.cli.bench_serve.drive import RunResult
from sterna.cli.bench_serve.metrics import summarize
from sterna.cli.bench_serve.options import ReportOptions
from sterna.cli.bench_serve.plot import draw_curves
from sterna.cli.bench_serve.record import Record
from sterna.core.machine import fingerprint, num_usable_cpus
from sterna.engine.build import build_engine
from sterna.engine.config import EngineConfig
from sterna.engine.engine import Engine
from sterna.engine.request import EngineRequest, RequestOutput, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
POLICIES = ("splitfuse", "whole-prompt")
NUM_STREAMS = 8
SHORT, SHORT_NEW = 50, 128
LONG, LONG_NEW = 1500, 64
PLAIN_IDS = range(1000, 16_000)


@dataclass(slots=True)
class Flight:
    """One request on its way; times in seconds on the load's clock."""

    num_prompt_tokens: int
    arrived: float
    is_stream: bool
    times: list[float] = field(default_factory=list)

    def record(self) -> Record:
        """As a client would have seen it."""
        first = self.times[0]
        pairs = zip(self.times, self.times[1:], strict=False)
        return Record(
            prompt_len=self.num_prompt_tokens,
            output_len=len(self.times),
            start=self.arrived,
            ttft=first - self.arrived,
            itls=tuple(after - before for before, after in pairs),
            latency=self.times[-1] - self.arrived,
        )


class Load:
    """Drives one engine in real time: arrivals when they are due, steps in between."""

    def __init__(self, engine: Engine, rate: float, seconds: float, seed: int) -> None:
        self._engine = engine
        self._seconds = seconds
        self._draw = random.Random(seed)
        self._due = self._arrivals(rate)
        self._flights: dict[str, Flight] = {}
        self._open: set[str] = set()
        self._start = 0.0

    def _arrivals(self, rate: float) -> list[float]:
        due, now = [], self._draw.expovariate(rate)
        while now < self._seconds:
            due.append(now)
            now += self._draw.expovariate(rate)
        return due

    def run(self) -> tuple[list[Flight], float]:
        """All flights and the seconds until the last one landed."""
        self._start = time.perf_counter()
        for _ in range(NUM_STREAMS):
            self._add(SHORT, SHORT_NEW, self._now(), is_stream=True)
        while self._open or self._due:
            self._add_due()
            if self._open:
                self._take(self._engine.step())
            else:
                time.sleep(max(0.0, self._due[0] - self._now()))
        return list(self._flights.values()), self._now()

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _add_due(self) -> None:
        while self._due and self._due[0] <= self._now():
            # Counted from when it was due: waiting for a step to end is part of its latency.
            self._add(LONG, LONG_NEW, heapq.heappop(self._due), is_stream=False)

    def _add(self, length: int, count: int, arrived: float, is_stream: bool) -> None:
        name = f"load-{id(self)}-{len(self._flights)}"
        ids = tuple(self._draw.choices(PLAIN_IDS, k=length))
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        self._flights[name] = Flight(length, arrived, is_stream)
        self._open.add(name)
        request = EngineRequest(request_id=name, prompt_token_ids=ids, params=params)
        self._engine.add(request)

    def _take(self, outputs: Sequence[RequestOutput]) -> None:
        now = self._now()
        for output in outputs:
            flight = self._flights[output.request_id]
            gained = sum(len(delta.token_ids) for delta in output.deltas)
            flight.times.extend([now] * gained)
            if output.is_finished:
                self._open.discard(output.request_id)
                if flight.is_stream and now < self._seconds:
                    self._add(SHORT, SHORT_NEW, now, is_stream=True)


def measure(engine: Engine, rate: float, seconds: float, options: ReportOptions) -> dict[str, Any]:
    """The figures of one policy at one rate, under the keys of `sterna bench serve`."""
    flights, duration = Load(engine, rate, seconds, seed=0).run()
    figures = summarize(RunResult([flight.record() for flight in flights], duration), options)
    streams = [flight.record() for flight in flights if flight.is_stream]
    of_streams = summarize(RunResult(streams, duration), options)
    return {
        **figures,
        "rate": rate,
        "stream_p99_itl_ms": of_streams["p99_itl_ms"],
        "stream_median_itl_ms": of_streams["median_itl_ms"],
    }


def compare(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """{policy: figures at each rate}, the policies in turn at every rate."""
    options = ReportOptions(sla=args.sla, ttft_scale=args.ttft_scale, metric_percentiles="99,99.9")
    engines = {
        policy: build_engine(
            "", EngineConfig(threads=args.threads, policy=policy, max_model_len=4096)
        )
        for policy in POLICIES
    }
    curves: dict[str, list[dict[str, Any]]] = {policy: [] for policy in POLICIES}
    for engine in engines.values():
        Load(engine, 2.0, 1.0, seed=1).run()  # warm-up
    for rate in (float(part) for part in args.rates.split(",")):
        for policy, engine in engines.items():
            figures = measure(engine, rate, args.seconds, options)
            curves[policy].append(figures)
            print(line(policy, figures), flush=True)
    return curves


def line(policy: str, figures: dict[str, Any]) -> str:
    """One measured point."""
    effective = ", ".join(f"{k}: {v:.2f}" for k, v in figures["effective_throughput"].items())
    return (
        f"{policy:>12} {figures['rate']:5.2f}/s: stream gap p50 "
        f"{figures['stream_median_itl_ms']:6.1f} p99 {figures['stream_p99_itl_ms']:7.1f} ms, "
        f"{figures['output_throughput']:6.1f} tok/s, {figures['request_throughput']:5.2f} req/s, "
        f"effective req/s at {{{effective}}} tok/s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the JSON and the curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", default="0.25,0.5,0.75,1.0,1.25", help="long prompts a second")
    parser.add_argument("--seconds", type=float, default=30.0, help="arrivals at each point")
    parser.add_argument("--sla", default="4,6,10", help="tokens/s each stream must keep")
    parser.add_argument("--ttft-scale", type=float, default=4.0, help="x prompt/512 s")
    parser.add_argument("--threads", type=int, default=num_usable_cpus())
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "img" / "splitfuse.png")
    args = parser.parse_args(argv)
    print(fingerprint().line())
    curves = compare(args)
    args.out.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now().strftime("%Y-%m-%dT%H%M%S")
    result = {"machine": fingerprint().as_dict(), "curves": curves}
    path = args.out / f"splitfuse-{stamp}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    title = f"{LONG}-token prompts among {NUM_STREAMS} decoding streams"
    draw_curves(curves, args.plot, title, over=("rate", "long prompts offered/s"))
    print(f"{path}, {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
