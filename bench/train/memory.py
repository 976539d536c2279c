"""The longest row that trains in a given memory: transformers, DeepSpeed's tiles, Sterna's steps.

    python bench/train/memory.py [--caps 4,8] [--threads 2] [--most 65536] [--out bench/results]

The model has 4 Llama blocks of 256 (8 heads, 2 for keys), inner 1,024 and 128,256 tokens, in
bfloat16 with bfloat16 AdamW moments. A point is a whole step in a process of its own that may have
`cap` GiB of writable memory (RLIMIT_DATA, libraries included); the row doubles until that does not
suffice and is then bisected to one part in 16. Sterna's rows are documents of 1,024 tokens, since
attention over one would take its time and not its memory; transformers attends over the whole row.
A row of --most tokens that trains ends the search: the table then says ">=".
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
from points import llama, measure

from sterna.core.machine import fingerprint
from sterna.core.rundir import write_atomic

CONFIG = llama(256, 4, 128_256, 1024)
TILES = {"checkpoint": True, "mlp_tile": 1024, "attention_tile": 1024, "head_rows": 256}
CONTESTANTS: dict[str, dict[str, Any]] = {
    "transformers": {"system": "transformers"},
    "transformers + checkpoints": {"system": "transformers", "checkpoint": True},
    "DeepSpeed tiled loss and MLP + checkpoints": {"system": "deepspeed"},
    "Sterna, all logits": {"full_logits": True},
    "+ chunked loss": {"longseq": {"head_rows": 256}},
    "+ checkpoints": {"longseq": {"checkpoint": True, "head_rows": 256}},
    "+ tiled MLP": {"longseq": {"checkpoint": True, "mlp_tile": 1024, "head_rows": 256}},
    "+ tiled attention half": {"longseq": TILES},
    "+ checkpoints on disk": {"longseq": {**TILES, "tier": "disk"}},
}


def main() -> int:
    """Search, print, plot, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--caps", default="4,8", help="GiB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--most", type=int, default=65_536)
    parser.add_argument("--only", default="", help="contestants whose names hold this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    args = parser.parse_args()
    table = {}
    for cap in (float(c) for c in args.caps.split(",")):
        found: dict[str, dict[str, Any]] = {}
        for name, job in CONTESTANTS.items():
            if args.only in name:
                found[name] = search(job, cap, args)
                print(f"{cap:g} GiB  {name:45} {found[name]}", flush=True)
        table[f"{cap:g}"] = found
    name = f"memory-{datetime.now(UTC):%Y-%m-%d}"
    facts = {"machine": fingerprint().as_dict(), "most": args.most, "config": CONFIG,
             "caps_gib": table}  # fmt: skip
    write_atomic(args.out / f"{name}.json", json.dumps(facts, indent=1) + "\n")
    write_atomic(args.out / f"{name}.md", markdown(table, args.most) + "\n")
    plot(table, args.out / f"{name}.png")
    print(markdown(table, args.most))
    return 0


def search(job: dict[str, Any], cap: float, args: argparse.Namespace) -> dict[str, Any]:
    """The longest row that trained, the seconds of its step, whether it could go on."""
    low, high, seconds = 0, 1024, 0.0
    while high <= args.most:
        found = fits(job, cap, high, args)
        if found is None:
            break
        low, seconds, high = high, found["seconds"], high * 2
    else:
        return {"tokens": low, "seconds": seconds, "is_most": True}
    low = low or 64
    while high - low > low // 16:
        middle = (low + high) // 2 // 64 * 64
        if middle in (low, high):
            break
        found = fits(job, cap, middle, args)
        low, high = (low, middle) if found is None else (middle, high)
        seconds = seconds if found is None else found["seconds"]
    return {"tokens": low, "seconds": seconds, "is_most": False}


def fits(
    job: dict[str, Any], cap: float, tokens: int, args: argparse.Namespace
) -> dict[str, Any] | None:
    """One step of `tokens` tokens under the cap."""
    return measure(args.threads, config=CONFIG, seq_len=tokens, document=1024,
                   cap=int(cap * 2**30), **job)  # fmt: skip


def markdown(table: dict[str, dict[str, dict[str, Any]]], most: int) -> str:
    """One line a contestant, with its ratio to plain transformers."""
    caps = list(table)
    lines = ["| | " + " | ".join(f"{cap} GiB: tokens | ratio | s a step" for cap in caps) + " |",
             "| --- |" + " --- | --- | --- |" * len(caps)]  # fmt: skip
    for name in next(iter(table.values())):
        cells = []
        for cap in caps:
            row, base = table[cap][name], next(iter(table[cap].values()))
            sign = ">= " if row["is_most"] else ""
            ratio = row["tokens"] / base["tokens"]
            cells.append(f"{sign}{row['tokens']:,} | {sign}{ratio:.1f}x | {row['seconds']:.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(table: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Bars of the longest rows, a log scale."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    names = list(next(iter(table.values())))
    for i, (cap, found) in enumerate(table.items()):
        at = [j + i * 0.4 for j in range(len(names))]
        bars = axes.barh(at, [found[n]["tokens"] for n in names], 0.38, label=f"{cap} GiB")
        texts = [(">= " if found[n]["is_most"] else "") + f"{found[n]['tokens']:,}" for n in names]
        axes.bar_label(bars, texts, fontsize=7, padding=2)
    axes.set_yticks([j + 0.2 for j in range(len(names))], names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("longest row that trains, tokens")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
