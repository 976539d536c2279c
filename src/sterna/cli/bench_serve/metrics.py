"""Records to figures, under the JSON keys of `vllm bench serve`.

TPOT = (E2EL - TTFT) / (output tokens - 1) per request; ITL = all gaps of all requests pooled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from sterna.cli.bench_serve.drive import RunResult
from sterna.cli.bench_serve.effective import effective_throughput
from sterna.cli.bench_serve.options import ReportOptions
from sterna.cli.bench_serve.record import Record

_MS = 1000.0


def summarize(result: RunResult, options: ReportOptions) -> dict[str, Any]:
    """All figures of one run. Throughputs are per second, latencies in ms by their key."""
    good = [record for record in result.records if record.is_success]
    duration = result.duration
    total_input = sum(record.prompt_len for record in good)
    total_output = sum(record.output_len for record in good)
    figures: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(result.records) - len(good),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": len(good) / duration,
        "request_goodput": _goodput(good, duration, options.service_levels()),
        "output_throughput": total_output / duration,
        "total_token_throughput": (total_input + total_output) / duration,
        "max_output_tokens_per_s": _peak_output(good),
        "max_concurrent_requests": _peak_concurrency(good),
    }
    for name, values in samples_ms(good).items():
        figures |= _distribution(name, values, options.percentiles())
    figures["effective_throughput"] = effective_throughput(
        good, duration, options.slas(), options.ttft_scale
    )
    figures["effective_ttft_scale"] = options.ttft_scale
    return figures | _probe_figures(result.probe_latencies, options.percentiles())


def samples_ms(records: Sequence[Record]) -> dict[str, list[float]]:
    """{metric: its samples in ms}."""
    return {
        "ttft": [record.ttft * _MS for record in records],
        "tpot": [record.tpot * _MS for record in records if record.tpot is not None],
        "itl": [gap * _MS for record in records for gap in record.itls],
        "e2el": [record.latency * _MS for record in records],
    }


def _distribution(name: str, values: list[float], percentiles: Sequence[float]) -> dict[str, float]:
    data = np.asarray(values or [0.0])
    figures = {
        f"mean_{name}_ms": float(data.mean()),
        f"median_{name}_ms": float(np.median(data)),
        f"std_{name}_ms": float(data.std()),
    }
    for percentile in percentiles:
        figures[f"p{percentile:g}_{name}_ms"] = float(np.percentile(data, percentile))
    return figures


def _goodput(records: Sequence[Record], duration: float, levels: dict[str, float]) -> float | None:
    if not levels:
        return None

    def is_good(record: Record) -> bool:
        seen = {"ttft": record.ttft, "tpot": record.tpot or 0.0, "e2el": record.latency}
        return all(seen[name] * _MS <= limit for name, limit in levels.items())

    return sum(is_good(record) for record in records) / duration


def _peak_output(records: Sequence[Record]) -> float:
    """Most output tokens in one second of the run; tokens of one piece share its time."""
    buckets: dict[int, float] = {}
    for record in records:
        arrivals = list(accumulate(record.itls, initial=record.start + record.ttft))
        share = record.output_len / len(arrivals)
        for at in arrivals:
            buckets[math.floor(at)] = buckets.get(math.floor(at), 0.0) + share
    return max(buckets.values(), default=0.0)


def _peak_concurrency(records: Sequence[Record]) -> int:
    """Most requests in flight at one time."""
    edges = [(record.start, 1) for record in records]
    edges += [(record.start + record.latency, -1) for record in records]
    # At equal times an end sorts before a start.
    running = accumulate(change for _, change in sorted(edges))
    return max(running, default=0)


def _probe_figures(latencies: list[float], percentiles: Sequence[float]) -> dict[str, Any]:
    if not latencies:
        return {}
    in_ms = [latency * _MS for latency in latencies]
    return {"probe_completed": len(latencies), **_distribution("probe", in_ms, percentiles)}


def details(records: Sequence[Record]) -> dict[str, Any]:
    """Per-request lists for --save-detailed, seconds."""
    return {
        "input_lens": [record.prompt_len for record in records],
        "output_lens": [record.output_len for record in records],
        "ttfts": [record.ttft for record in records],
        "itls": [list(record.itls) for record in records],
        "latencies": [record.latency for record in records],
        "start_times": [record.start for record in records],
        "queue_times": [record.queued for record in records],
        "generated_texts": [record.text for record in records],
        "errors": [record.error for record in records],
    }
