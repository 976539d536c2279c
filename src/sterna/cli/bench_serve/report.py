"""Print and keep the figures of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from sterna.cli.bench_serve.options import LoadOptions, ReportOptions, TargetOptions
from sterna.core.errors import ConfigError, SternaError
from sterna.core.machine import fingerprint
from sterna.core.rundir import write_atomic

_WIDTH = 58
_TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
    "probe": "Probe Requests",
}


def print_figures(figures: dict[str, Any], options: ReportOptions) -> None:
    """The table of one run, labelled as in `vllm bench serve`."""
    print(" Serving Benchmark Result ".center(_WIDTH, "="))
    for label, text in _totals(figures):
        print(f"{label + ':':<44}{text:>14}")
    shown = [*options.metrics(), *(["probe"] if "probe_completed" in figures else [])]
    for name in shown:
        print(f" {_TITLES[name]} ".center(_WIDTH, "-"))
        for label, value in _latencies(name, figures, options):
            print(f"{label + ':':<44}{value:>14.2f}")
    print("=" * _WIDTH)


def _totals(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "Successful requests", str(figures["completed"])
    yield "Failed requests", str(figures["failed"])
    yield "Benchmark duration (s)", f"{figures['duration']:.2f}"
    yield "Total input tokens", str(figures["total_input_tokens"])
    yield "Total generated tokens", str(figures["total_output_tokens"])
    yield "Request throughput (req/s)", f"{figures['request_throughput']:.2f}"
    if figures["request_goodput"] is not None:
        yield "Request goodput (req/s)", f"{figures['request_goodput']:.2f}"
    yield "Output token throughput (tok/s)", f"{figures['output_throughput']:.2f}"
    yield "Peak output token throughput (tok/s)", f"{figures['max_output_tokens_per_s']:.2f}"
    yield "Peak concurrent requests", str(figures["max_concurrent_requests"])
    yield "Total token throughput (tok/s)", f"{figures['total_token_throughput']:.2f}"
    scale = figures["effective_ttft_scale"]
    for level, rate in figures["effective_throughput"].items():
        yield f"Effective at {level} tok/s, TTFT x{scale:g} (req/s)", f"{rate:.2f}"


def _latencies(
    name: str, figures: dict[str, Any], options: ReportOptions
) -> Iterator[tuple[str, float]]:
    short = name.upper()
    yield f"Mean {short} (ms)", figures[f"mean_{name}_ms"]
    yield f"Median {short} (ms)", figures[f"median_{name}_ms"]
    for percentile in options.percentiles():
        yield f"P{percentile:g} {short} (ms)", figures[f"p{percentile:g}_{name}_ms"]


def describe_run(
    target: TargetOptions, load: LoadOptions, options: ReportOptions, model: str
) -> dict[str, Any]:
    """The settings part of a result: what was asked of whom, on which machine."""
    is_bounded = load.request_rate != float("inf")
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": target.backend,
        "backend": target.backend,
        "label": options.label or target.backend,
        "model_id": model,
        "tokenizer_id": target.tokenizer or model,
        "num_prompts": load.num_prompts,
        "dataset_name": "trace" if load.trace_path else load.dataset_name,
        "request_rate": load.request_rate if is_bounded else "inf",
        "burstiness": load.burstiness,
        "max_concurrency": load.max_concurrency,
        "ramp_up_strategy": load.ramp_up_strategy,
        "ramp_up_start_rps": load.ramp_up_start_rps,
        "ramp_up_end_rps": load.ramp_up_end_rps,
        "seed": load.seed,
        "machine": fingerprint().as_dict(),
        **options.notes(),
    }


def save(results: list[dict[str, Any]], options: ReportOptions) -> Path:
    """Write one JSON object a run, one a line when several; SternaError when it cannot."""
    first = results[0]
    default = f"{first['label']}-{first['model_id'].replace('/', '_')}-{first['date']}.json"
    path = options.result_dir / (options.result_filename or default)
    text = "".join(json.dumps(result) + "\n" for result in results)
    try:
        kept = path.read_text() if options.append_result and path.exists() else ""
        write_atomic(path, kept + text)
    except OSError as error:
        raise SternaError(f"cannot write result {path}: {error.strerror}") from error
    return path


def check_saving(options: ReportOptions) -> None:
    """Refuse options without effect before an hour of measuring is spent. ConfigError."""
    needing = {"save_detailed", "append_result", "result_dir", "result_filename"}
    given = sorted(needing & options.model_fields_set)
    if given and not options.save_result:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{names} without --save-result: nothing would be written; add it")
    if options.plot is not None and not options.sweep:
        raise ConfigError("--plot draws a sweep; give --sweep concurrency=1,2,4,8")
