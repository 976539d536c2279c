"""The longest row that trains in a given memory: transformers, DeepSpeed's tiles, Sterna's steps.

    python bench/train/memory.py [--caps 4,8] [--threads 2] [--file RESULT.json]

The model has 4 Llama blocks of 256 (8 heads, 2 for keys), inner 1,024 and 128,256 tokens, in
bfloat16 with bfloat16 AdamW moments. A point is a whole step, optimizer included, in a process of
its own that may have `cap` GiB of writable memory (RLIMIT_DATA, libraries included); the row is one
document, over which everybody attends. Rows grow until one does not suffice, then are bisected to
one part in 16; the next to try follows from how the memory of the last two grew. A row 16 times
that of plain transformers ends the search (">=" in the table; one contestant goes to 32):
attention over one document takes its time. Rows marked * are documents of 1,024 tokens, which
changes that time and not the memory.

Every point is stored at once, and a second call goes on from the stored ones. A point that ran for
--timeout seconds counts as one beyond patience, not beyond memory. `--table` writes table and
picture from what is stored.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
from points import llama, measure

from sterna.core.machine import fingerprint
from sterna.core.rundir import write_atomic

Point = dict[str, Any]  # tokens, fits, seconds, data (bytes of writable memory), timed_out

CONFIG = llama(256, 4, 128_256, 1024)
TIMES = 16
TILES = {"checkpoint": True, "mlp_tile": 1024, "attention_tile": 1024, "head_rows": 256}
FULL = {"states": "float32", "master": True, "document": 1024}
AWAY = ("states", "weights")
FARTHER = "+ checkpoints on disk *"  # goes to twice TIMES
SHORT = {"document": 1024}  # attention takes its time over them, and the same memory
CONTESTANTS: dict[str, dict[str, Any]] = {
    "transformers": {"system": "transformers"},
    "transformers + checkpoints": {"system": "transformers", "checkpoint": True},
    "DeepSpeed tiled loss and MLP + checkpoints": {"system": "deepspeed"},
    "Sterna, all logits": {"full_logits": True},
    "+ chunked loss": {"longseq": {"head_rows": 256}},
    "+ checkpoints *": {"longseq": {"checkpoint": True, "head_rows": 256}, **SHORT},
    "+ tiled MLP *": {"longseq": {"checkpoint": True, "mlp_tile": 1024, "head_rows": 256}, **SHORT},
    "+ tiled attention half *": {"longseq": TILES, **SHORT},
    "+ checkpoints on disk *": {"longseq": {**TILES, "tier": "disk"}, **SHORT},
    "the same with float32 states, masters *": {"longseq": {**TILES, "tier": "disk"}, **FULL},
    "+ states and weights on disk *": {
        "longseq": {**TILES, "tier": "disk"}, **FULL, "offload": dict.fromkeys(AWAY, "disk"),
    },
}  # fmt: skip


def main() -> int:
    """Search, print, plot, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--caps", default="4,8", help="GiB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds of a point")
    parser.add_argument("--only", default="", help="contestants whose names hold this")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    results = Path(__file__).parents[1] / "results"
    parser.add_argument(
        "--file", type=Path, default=results / f"memory-{datetime.now(UTC):%Y-%m-%d}.json"
    )
    args = parser.parse_args()
    facts = json.loads(args.file.read_text()) if args.file.exists() else {}
    facts = {"machine": fingerprint().as_dict(), "config": CONFIG, "threads": args.threads,
             "caps_gib": {}, **facts, "contestants": CONTESTANTS}  # fmt: skip
    for cap in () if args.table else args.caps.split(","):
        for name in CONTESTANTS:
            if args.only in name:
                search(name, cap, facts, args)
    table = {cap: {n: longest(p) for n, p in found.items() if n in CONTESTANTS}
             for cap, found in facts["caps_gib"].items()}  # fmt: skip
    write_atomic(args.file.with_suffix(".md"), markdown(table) + "\n")
    plot(table, args.file.with_suffix(".png"))
    print(markdown(table))
    return 0


def search(name: str, cap: str, facts: dict[str, Any], args: argparse.Namespace) -> None:
    """Add the points of a contestant to `facts`, and store them, until its longest row is known."""
    points: list[Point] = facts["caps_gib"].setdefault(cap, {}).setdefault(name, [])
    most = 1 << 20
    if CONTESTANTS[name].get("system") != "transformers":
        plain = facts["caps_gib"][cap][next(iter(CONTESTANTS))]
        times = 2 * TIMES if name == FARTHER else TIMES
        most = times * int(longest(plain)["tokens"])
    while (tokens := next_row(points, float(cap) * 2**30, most)) is not None:
        points.append(point(CONTESTANTS[name], cap, tokens, args))
        print(f"{cap} GiB  {name:45} {points[-1]}", flush=True)
        write_atomic(args.file, json.dumps(facts, indent=1) + "\n")


def next_row(points: list[Point], cap: float, most: int) -> int | None:
    """How many tokens to try next; None when the longest row is known."""
    good = sorted((p for p in points if p["fits"]), key=lambda p: int(p["tokens"]))
    low = good[-1]["tokens"] if good else 0
    high = min((p["tokens"] for p in points if not p["fits"]), default=2 * most)
    step = max(128, 1 << (low // 16).bit_length() - 1) if low else 128
    if low >= most or high - low <= step:
        return None
    if len(good) < 2:
        return min(1024 * 2 ** len(good), (low + high) // 2)
    (x0, y0), (x1, y1) = ((p["tokens"], p["data"]) for p in good[-2:])
    slope = max((y1 - y0) / (x1 - x0), 1.0)
    guess = int(low + (cap - y1) / slope) // step * step
    if high <= most:  # between what did and what did not suffice
        return max(low + step, min(guess, high - step))
    if guess > 1.5 * most:
        return most
    return min(max(low + step, min(guess, 8 * low)), most)


def point(job: dict[str, Any], cap: str, tokens: int, args: argparse.Namespace) -> Point:
    """One step of a row of `tokens` tokens under the cap."""
    row: Point = {"tokens": tokens, "fits": False}
    try:
        found = measure(args.threads, args.timeout, config=CONFIG, seq_len=tokens,
                        cap=int(float(cap) * 2**30), **{"document": tokens, **job})  # fmt: skip
    except subprocess.TimeoutExpired:
        return row | {"timed_out": True}
    if found is None:
        return row
    return row | {"fits": True, "seconds": found["seconds"], "data": found["data"],
                  "peak": found["peak"]}  # fmt: skip


def longest(points: list[Point]) -> dict[str, Any]:
    """The longest row that trained, its seconds, and whether only the patience ended there."""
    best = max((p for p in points if p["fits"]), key=lambda p: int(p["tokens"]))
    longer = [p for p in points if p["tokens"] > best["tokens"]]
    is_most = all(p.get("timed_out", False) for p in longer)
    return {**best, "is_most": is_most}


def markdown(table: dict[str, dict[str, dict[str, Any]]]) -> str:
    """One line a contestant, with its ratio to plain transformers."""
    caps = list(table)
    heads = " | ".join(f"{cap} GiB: tokens | ratio | GiB | s a step" for cap in caps)
    lines = [f"| | {heads} |", "| --- |" + " --- | --- | --- | --- |" * len(caps)]
    for name in CONTESTANTS:
        cells = []
        for cap in caps:
            if name not in table[cap]:
                cells.append("- | - | - | -")
                continue
            row, base = table[cap][name], next(iter(table[cap].values()))
            sign = ">= " if row["is_most"] else ""
            ratio = row["tokens"] / base["tokens"]
            size = row["data"] / 2**30
            cells.append(
                f"{sign}{row['tokens']:,} | {sign}{ratio:.1f}x | {size:.2f} | {row['seconds']:.0f}"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(table: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Bars of the longest rows, a log scale."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    names = [n for n in CONTESTANTS if any(n in found for found in table.values())]
    none = {"tokens": 1, "is_most": False}
    for i, (cap, found) in enumerate(table.items()):
        at = [j + i * 0.4 for j in range(len(names))]
        bars = axes.barh(
            at, [found.get(n, none)["tokens"] for n in names], 0.38, label=f"{cap} GiB"
        )
        texts = [
            (">= " if found.get(n, none)["is_most"] else "") + f"{found[n]['tokens']:,}"
            if n in found
            else ""
            for n in names
        ]
        axes.bar_label(bars, texts, fontsize=7, padding=2)
    axes.set_yticks([j + 0.2 for j in range(len(names))], names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(1000, 400_000)
    axes.set_xlabel("longest row that trains, tokens")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
