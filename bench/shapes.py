"""Decode speed by model size against the byte bound and against llama.cpp on the same shape.

    python bench/shapes.py [--shapes 135m 1b 4b] [--rounds 3] [--tokens 32] [--out bench/results/X]

The bound is (weight bytes that a step reads) / (what plain reading threads get from memory, in the
same round). Weights are random, so nothing has to be quantised; the 135M shape runs against the
GGUF files that `compare.py` has made of the real model. Needs the `gguf` package and llama.cpp
under .peers (`bench/peers/setup.py llamacpp`, or --peers). Rounds: bandwidth, Sterna, each file;
medians, and the ratio is taken within a round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from shape_models import (
    CONTEXT,
    SHAPES,
    Shape,
    build_random_engine,
    read_bytes,
    write_random_gguf,
)
from sterna.core.machine import fingerprint, num_usable_cpus
from sterna.engine.engine import Engine
from sterna.engine.request import EngineRequest, SamplingParams
from stream_read import StreamReader

MIXES = ("Q6_K", "Q4_K_M")
PROMPT = 16
Row = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--weights", default="fp6")
    parser.add_argument("--threads", type=int, default=num_usable_cpus())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--peers", type=Path, default=Path(__file__).parents[1] / ".peers")
    parser.add_argument("--only-make", action="store_true", help="write the GGUF files and stop")
    parser.add_argument("--out", type=Path, help="prefix of a .json and a .md file")
    args = parser.parse_args()
    assert PROMPT + args.tokens <= CONTEXT, f"--tokens is at most {CONTEXT - PROMPT}"
    print(fingerprint().line())
    rows = [row for name in args.shapes for row in bench(SHAPES[name], name, args)]
    if args.out and rows:
        args.out.with_suffix(".md").write_text(table(rows))
        result = {"machine": fingerprint().as_dict(), "threads": args.threads, "rows": rows}
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=1))


def bench(shape: Shape, name: str, args: argparse.Namespace) -> list[Row]:
    """A row for Sterna and one for each GGUF file."""
    files = gguf_files(shape, name, args.peers)
    if args.only_make:
        return []
    reader = StreamReader(args.threads)
    engine = build_random_engine(shape, args.weights, args.threads)
    size = read_bytes(engine.runner.decoder)  # type: ignore[arg-type]
    calls: dict[str, Callable[[], float]] = {
        f"sterna {args.weights}": lambda: decode_speed(engine, args.tokens)
    }
    for label, file in files.items():
        calls[f"llama.cpp {label}"] = lambda file=file: llama_speed(file, args)  # type: ignore[misc]
    decode_speed(engine, 4)
    speeds: dict[str, list[float]] = {label: [] for label in calls}
    gbs = []
    for _ in range(args.rounds):
        before = max(reader.gbs() for _ in range(2))
        for label, call in calls.items():
            speeds[label].append(call())
        gbs.append(max(before, reader.gbs()))
    return [row(shape, label, speeds, gbs, size) for label in calls]


def row(
    shape: Shape, label: str, speeds: dict[str, list[float]], gbs: list[float], size: int
) -> Row:
    own = next(iter(speeds))
    ratio = median(a / b for a, b in zip(speeds[own], speeds[label], strict=True))
    found: Row = {"shape": shape.name, "system": label, "tok_s": median(speeds[label]),
                  "sterna_over_it": ratio, "all_tok_s": speeds[label]}  # fmt: skip
    if label == own:
        shares = [s * size / 1e9 / b for s, b in zip(speeds[label], gbs, strict=True)]
        found |= {"bytes": size, "read_gbs": median(gbs), "share": median(shares), "shares": shares}
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
    return found


def gguf_files(shape: Shape, name: str, peers: Path) -> dict[str, Path]:
    """Label -> file; random ones are made where they are missing."""
    if shape.hidden % 256:
        real = {label: peers / "model" / f"{label.lower()}.gguf" for label in ("Q6_K", "Q4_0")}
        return {label: file for label, file in real.items() if file.exists()}
    folder = peers / "shapes"
    folder.mkdir(parents=True, exist_ok=True)
    files = {mix: folder / f"{name}-{mix.lower()}.gguf" for mix in MIXES}
    for mix, file in files.items():
        if not file.exists():
            part = file.with_suffix(".part")
            print(f"writing {file}, {write_random_gguf(shape, mix, part) / 1e6:,.0f} MB a step")
            part.rename(file)
    return files


def decode_speed(engine: Engine, num_tokens: int) -> float:
    """Tokens a second of one greedy stream after its first token."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens + 1, ignore_eos=True)
    prompt = tuple(range(100, 100 + PROMPT))
    name = f"shape-{time.perf_counter_ns()}"
    engine.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params))
    engine.step()
    started, count = time.perf_counter(), 0
    while engine.has_work:
        count += sum(len(d.token_ids) for output in engine.step() for d in output.deltas)
    assert count == num_tokens, f"{count} tokens came, {num_tokens} were asked for: NaN logits?"
    return count / (time.perf_counter() - started)


def llama_speed(file: Path, args: argparse.Namespace) -> float:
    """The same by llama.cpp's own program."""
    program = args.peers / "llamacpp" / "build" / "bin" / "llama-bench"
    command = [program, "-m", file, "-t", str(args.threads), "-p", "0", "-n", str(args.tokens),
               "-r", "1", "-o", "jsonl"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return float(json.loads(lines[-1])["avg_ts"])


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["# Decode of one stream by model size", "", fingerprint().line(), "",
             "| shape | system | tok/s | Sterna over it | MB a step | GB/s read | share |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        bound = ("", "", "")
        if "bytes" in r:
            bound = (f"{r['bytes'] / 1e6:,.0f}", f"{r['read_gbs']:.1f}", f"{r['share']:.0%}")  # type: ignore[operator]
        lines.append(f"| {r['shape']} | {r['system']} | {r['tok_s']:.1f} | "
                     f"{r['sterna_over_it']:.2f} | {' | '.join(bound)} |")  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
