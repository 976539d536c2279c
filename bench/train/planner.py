"""The planner's memory against the measured peak, over sizes and settings, on this CPU.

    python bench/train/planner.py [--threads 1] [--out bench/results]

A point is two steps of a Llama-shaped model in a process of its own (memory_point.py); its peak is
the high-water mark of resident memory, less what the process had before it made a model. Documents
have 512 tokens, so that points are quick; memory does not depend on them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
from points import llama, measure
from rich.progress import track

from sterna.core.machine import fingerprint
from sterna.core.rundir import write_atomic
from sterna.model.config import parse_config
from sterna.train.longseq.config import LongseqSection
from sterna.train.memory import Job, Layout, Shape, estimate
from sterna.train.offload.config import OffloadSection

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpoint": {"checkpoint": True},
    "tiled mlp": {"checkpoint": True, "mlp_tile": 512},
    "tiles": {"checkpoint": True, "mlp_tile": 512, "attention_tile": 512},
    "small head": {"checkpoint": True, "mlp_tile": 512, "attention_tile": 512, "head_rows": 256},
    "disk": {"checkpoint": True, "mlp_tile": 512, "attention_tile": 512, "tier": "disk"},
    "every 2": {"checkpoint": True, "mlp_tile": 512, "attention_tile": 512, "every": 2},
}
# (hidden, blocks, vocabulary): where the head, the blocks or the states are the largest part.
SIZES = [(256, 4, 32_000), (256, 8, 8_000), (512, 4, 8_000), (768, 4, 16_000), (256, 2, 128_256)]
LENGTHS = (1024, 4096)
# Float32 moments and masters in memory, on disk, and the weights with them.
OFFLOADS: dict[str, dict[str, Any]] = {
    "float32 states": {},
    "states on disk": {"states": "disk"},
    "states and weights on disk": {"states": "disk", "weights": "disk"},
}


def main() -> int:
    """Measure, compare, plot, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    args = parser.parse_args()
    grid = [(size, length, name) for i, (size, length, name) in
            enumerate(itertools.product(SIZES, LENGTHS, SETTINGS)) if i % 2 == 0]  # fmt: skip
    grid += list(itertools.product(SIZES, LENGTHS[1:], OFFLOADS))
    rows = [point(*p, args.threads) for p in track(grid, description="points")]
    errors = [abs(row["error"]) for row in rows]
    facts = {"machine": fingerprint().as_dict(), "median_error": statistics.median(errors),
             "worst_error": max(errors), "points": rows}  # fmt: skip
    name = f"planner-{datetime.now(UTC):%Y-%m-%d}"
    write_atomic(args.out / f"{name}.json", json.dumps(facts, indent=1) + "\n")
    plot(rows, args.out / f"{name}.png")
    print(f"{len(rows)} points: median error {statistics.median(errors):.1%}, worst "
          f"{max(errors):.1%}")  # fmt: skip
    return 0


def point(size: tuple[int, int, int], length: int, name: str, threads: int) -> dict[str, Any]:
    """One size and setting, both ways."""
    config = llama(*size)
    is_full = name in OFFLOADS
    settings, away = SETTINGS["disk" if is_full else name], OFFLOADS.get(name, {})
    states = "float32" if is_full else "bfloat16"
    found = measure(threads, config=config, seq_len=length, longseq=settings, steps=2, document=512,
                    states=states, master=is_full, offload=away)  # fmt: skip
    assert found is not None
    shape = Shape.of(parse_config({**config, "architectures": ["LlamaForCausalLM"]}, "bench"))
    job = Job(length, 2, states, has_master=is_full)
    predicted = estimate(shape, job, LongseqSection(**settings), Layout(), OffloadSection(**away))
    measured = found["peak"] - found["libs"]
    row = {"hidden": size[0], "layers": size[1], "vocab": size[2], "tokens": length,
           "settings": name, "measured": measured, "predicted": predicted.peak,
           "moment": predicted.peak_moment, "error": predicted.peak / measured - 1}  # fmt: skip
    print(row, file=sys.stderr, flush=True)
    return row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted against measured, with the 5 and 10 % lines."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 5))
    for name in (*SETTINGS, *OFFLOADS):
        mine = [row for row in rows if row["settings"] == name]
        axes.scatter([r["measured"] / 1e6 for r in mine], [r["predicted"] / 1e6 for r in mine],
                     label=name, s=18)  # fmt: skip
    top = max(row["measured"] for row in rows) / 1e6 * 1.1
    for share, style in ((0.0, "-"), (0.05, "--"), (0.1, ":")):
        for sign in (1, -1) if share else (1,):
            axes.plot([0, top], [0, top * (1 + sign * share)], style, color="gray", linewidth=0.8)
    axes.set_xlabel("measured peak, MB")
    axes.set_ylabel("predicted, MB")
    axes.set_title("Memory of a training step (lines: exact, 5 %, 10 %)")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
