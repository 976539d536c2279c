"""SplitFuse, SwiftKV, speculation and FP6 together, on a trace of real code requests, over HTTP.

    python bench/combined.py TRACE --student FOLDER --name llamacpp            # all at once
    python bench/combined.py TRACE --student FOLDER --name sterna --rate 0.8   # requests/s
    python bench/combined.py --table                                           # what was measured

TRACE: the Azure LLM inference trace of code completions (CSV). Its first requests keep their
gaps, in proportion, and their lengths, clipped to 2,048 tokens with at most 256 new ones. The trace
has no text: prompts are distinct pieces of Python's standard library. Every contestant gets the
same requests at the same times, one window each, and new tokens are counted to the trace's length
(no early end). One call is one window, added to --out; completion time counts from when a request
was due.

Contestants: `sterna` (SwiftKV student, fp6 weights, speculation, SplitFuse), `sterna-off` (the
plain model in bfloat16, whole prompts, no speculation: the same engine), `llamacpp` (BF16),
`llamacpp-q6_k`, `llamacpp-q4_0` (llama-server, 16 slots, continuous batching).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from peers.children import SPECS, start, stop
from peers.served import free_port, wait_ready
from peers.weights import default_gguf, prepare
from sterna.cli.bench_serve.datasets import Sample
from sterna.cli.bench_serve.drive import Driver, open_pool, wait_until_ready
from sterna.cli.bench_serve.options import LoadOptions, TargetOptions
from sterna.cli.bench_serve.record import Record
from sterna.cli.bench_serve.traces import read_trace
from sterna.core.machine import fingerprint, num_usable_cpus
from sterna.core.rundir import write_atomic
from sterna.text.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
CONTEXT, NEW_TOKENS = 2048, 256
OURS = ("sterna", "sterna-off")
NAMES = (*OURS, "llamacpp", "llamacpp-q6_k", "llamacpp-q4_0")
WARM_UP = 2


def source_tokens(tokenizer: Tokenizer) -> Iterator[int]:
    """Tokens of the standard library's modules, one file after the other, tests left out."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield from tokenizer.encode(path.read_text("utf-8", "replace"), False)


def samples_of(trace: Path, count: int, tokenizer: Tokenizer) -> list[Sample]:
    """The trace's first requests with text, after WARM_UP short ones to warm up with."""
    arrivals = read_trace(trace, count)
    text = source_tokens(tokenizer)

    def sample(prompt_len: int, output_len: int, at_s: float) -> Sample:
        prompt = tokenizer.decode([next(text) for _ in range(prompt_len)])
        return Sample(prompt, prompt_len, output_len, at_s)

    found = [sample(400, 16, 0.0) for _ in range(WARM_UP)]
    for arrival in arrivals:
        new = min(max(arrival.num_output_tokens, 1), NEW_TOKENS)
        # Text that is cut into tokens again may have a few more: 32 are left.
        length = min(arrival.num_prompt_tokens, CONTEXT - new - 32)
        found.append(sample(length, new, arrival.at_s))
    return found


def due_times(samples: Sequence[Sample], rate: float) -> list[float]:
    """The trace's times, scaled so that `rate` requests a second are offered; 0 = all at once."""
    span = samples[-1].at_s or 0.0
    scale = len(samples) / rate / span if rate else 0.0
    return [scale * (sample.at_s or 0.0) for sample in samples]


def command(name: str, student: Path | None, port: int, threads: int) -> list[str]:
    """The server's command line."""
    if name not in OURS:
        from peers.weights import LLAMA_BIN

        return [str(LLAMA_BIN / "llama-server"), "-m", str(SPECS[name].model), "--host",
                "127.0.0.1", "--port", str(port), "-t", str(threads), "-np", "16", "-c",
                str(16 * CONTEXT), "-b", "2048", "-ub", "512"]  # fmt: skip
    assert student is not None or name != "sterna", "--student FOLDER: a SwiftKV model"
    options = {"port": port, "threads": threads, "max-model-len": CONTEXT}
    options |= (
        {"weights": "fp6", "speculation": "auto", "policy": "splitfuse"}
        if name == "sterna"
        else {"weights": "bf16", "speculation": "off", "policy": "whole-prompt"}
    )
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    model = student if name == "sterna" else default_gguf()
    return [sys.executable, "-m", "sterna.cli", "serve", str(model), *flags, "--no-log-requests"]


async def load(port: int, samples: Sequence[Sample], rate: float) -> tuple[list[Record], float]:
    """Send everything when it is due; the records and the seconds it all took."""
    target = TargetOptions(port=port)
    options = LoadOptions(num_warmups=WARM_UP, ignore_eos=True)
    pool = open_pool(target)
    try:
        driver = Driver(pool, target, options, await wait_until_ready(pool, target))
        await driver.warm_up(samples)
        asked = samples[WARM_UP:]
        run = await driver.run(asked, due_times(asked, rate), None, lambda record: None)
        return run.records, run.duration
    finally:
        pool.close()


def window(args: argparse.Namespace) -> dict[str, Any]:
    """Start one contestant, load it, stop it; its figures."""
    prepare([args.name] if args.name not in OURS else [])
    samples = samples_of(args.trace, args.requests, load_tokenizer(default_gguf()))
    cores, port = list(range(args.threads)), free_port()
    words = command(args.name, args.student, port, args.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server is stopped then too
    process = start(words, cores, f"{args.name}-combined.log", stdout=subprocess.DEVNULL)
    try:
        wait_ready(process, port, args.name)
        records, duration = asyncio.run(load(port, samples, args.rate))
    finally:
        stop(process)
    return figures(args, samples[WARM_UP:], records, duration)


def figures(
    args: argparse.Namespace, samples: Sequence[Sample], records: Sequence[Record], duration: float
) -> dict[str, Any]:
    """Completion times and throughput; AssertionError when a request failed or was cut."""
    faults = [record.error for record in records if record.error]
    assert not faults, faults[:3]
    pairs = zip(samples, records, strict=True)
    short = [(s.output_len, r.output_len) for s, r in pairs if s.output_len != r.output_len]
    assert not short, f"asked and got: {short[:5]}"
    times = [record.latency + record.queued for record in records]
    tokens = sum(record.prompt_len + record.output_len for record in records)
    return {
        "name": args.name,
        "rate": args.rate,
        "date": datetime.now().isoformat(timespec="seconds"),
        "num_requests": len(records),
        "duration_s": duration,
        "requests_per_s": len(records) / duration,
        "tokens_per_s": tokens / duration,
        "output_tokens_per_s": sum(record.output_len for record in records) / duration,
        "mean_s": mean(times),
        "p50_s": median(times),
        "p95_s": float(np.percentile(times, 95)),
        "mean_ttft_s": mean(record.ttft for record in records),
        "completion_s": [round(value, 4) for value in times],
    }


def table(windows: Sequence[dict[str, Any]]) -> str:
    """Markdown: every load's contestants, the mean of their windows, and ours against the rest."""
    keys = ("requests_per_s", "tokens_per_s", "mean_s", "p50_s", "p95_s", "mean_ttft_s")
    lines = ["| load, req/s | contestant | windows | " + " | ".join(keys) + " | mean / ours |"]
    lines.append("|---|---|---|" + "---|" * (len(keys) + 1))
    for rate in dict.fromkeys(w["rate"] for w in windows):
        by_name = {name: [w for w in windows if (w["rate"], w["name"]) == (rate, name)]
                   for name in NAMES}  # fmt: skip
        means = {name: {key: mean(w[key] for w in found) for key in keys}
                 for name, found in by_name.items() if found}  # fmt: skip
        for name, row in means.items():
            best = f"{row['mean_s'] / means['sterna']['mean_s']:.2f}x" if "sterna" in means else "-"
            cells = " | ".join(f"{row[key]:,.2f}" for key in keys)
            load = f"{rate:g}" if rate else "all at once"
            lines.append(f"| {load} | {name} | {len(by_name[name])} | {cells} | {best} |")
    return "\n".join(lines)


def main() -> None:
    """One window, or the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", nargs="?", type=Path)
    parser.add_argument("--name", choices=NAMES)
    parser.add_argument("--student", type=Path, help="folder of a SwiftKV model")
    parser.add_argument("--rate", type=float, default=0.0, help="requests/s; 0 = all at once")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--threads", type=int, default=num_usable_cpus())
    parser.add_argument("--note", default="", help="kept in the file: what the student is")
    parser.add_argument("--table", action="store_true")
    stamp = datetime.now().strftime("%Y-%m-%d")
    parser.add_argument("--out", type=Path, default=RESULTS / f"combined-{stamp}.json")
    args = parser.parse_args()
    kept = json.loads(args.out.read_text()) if args.out.exists() else {"windows": []}
    if args.name:
        if args.trace is None:
            parser.error("a window needs TRACE")
        kept["windows"].append(window(args))
        kept |= {"machine": fingerprint().as_dict(), "note": args.note or kept.get("note", "")}
        write_atomic(args.out, json.dumps(kept, indent=1) + "\n")
    text = table(kept["windows"])
    write_atomic(args.out.with_suffix(".md"), f"{fingerprint().line()}\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
