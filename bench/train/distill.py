"""Distillation runs as one result: what was trained, on how much, held-out figures.

    sterna train swiftkv.toml; sterna train speculator.toml     (kind = "distill", eval.every set)
    python bench/train/distill.py runs/swiftkv runs/speculator [--out bench/results/distill.json]
        [--plot docs/img/distill.png]

A run's own files are read: metrics.jsonl (losses, tokens, seconds), distill.jsonl (held-out
figures) and recipe.toml. Paths are reduced to names.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sterna.core.machine import fingerprint
from sterna.core.rundir import write_atomic
from sterna.train.metrics import FILE, read_metrics

MEASURED = "distill.jsonl"


def read_run(folder: Path) -> dict[str, Any]:
    """One run's settings, totals and curves."""
    lines = list(read_metrics(folder / FILE))
    steps = [line for line in lines if line["kind"] == "step"]
    held_out = list(read_metrics(folder / MEASURED))
    recipe = tomllib.loads((folder / "recipe.toml").read_text())
    return {
        "distill": recipe.get("distill", {}),
        "optim": recipe.get("optim", {}),
        "seq_len": recipe["data"].get("seq_len"),
        "rows_per_step": recipe["run"].get("rows_per_step"),
        "threads": recipe["run"].get("threads"),
        "dtype": recipe.get("model", {}).get("dtype", "bfloat16"),
        "sources": [Path(source["path"]).name for source in recipe["data"]["sources"]],
        "steps": len(steps),
        "tokens": sum(line["tokens"] for line in steps),
        "trained_tokens": sum(line["targets"] for line in steps),
        "seconds": round(sum(line["seconds"] for line in steps), 1),
        "train_loss": [[line["step"], round(line["loss"], 4)] for line in steps],
        "eval_loss": [[x["step"], round(x["loss"], 4)] for x in lines if x["kind"] == "eval"],
        "held_out": held_out,
    }


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Training loss of every run above its held-out figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(runs), figsize=(5.2 * len(runs), 6.4), squeeze=False)
    for column, (name, run) in enumerate(runs.items()):
        top, low = axes[0][column], axes[1][column]
        top.plot(*zip(*run["train_loss"], strict=True), lw=1, label="training")
        top.plot(*zip(*run["eval_loss"], strict=True), "o-", label="held out")
        top.set_title(f"{name}: loss of the distillation")
        top.legend()
        steps = [line["step"] for line in run["held_out"]]
        for key in _shown(run):
            low.plot(steps, [line[key] for line in run["held_out"]], "o-", label=key)
        low.set_title("held out")
        low.set_xlabel("steps")
        low.legend()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _shown(run: dict[str, Any]) -> list[str]:
    keys = (
        "teacher_loss",
        "student_loss",
        "kl",
        "tokens_per_step",
        "draft_1",
        "draft_2",
        "draft_3",
    )
    return [key for key in keys if key in run["held_out"][-1]]


def main() -> None:
    """Read the runs, write the result and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    runs = {folder.name.removeprefix("run-"): read_run(folder) for folder in options.runs}
    day = datetime.now(UTC)
    result = {
        "date": day.isoformat(timespec="seconds"),
        "machine": fingerprint().as_dict(),
        "command": "sterna train RECIPE.toml, one a run",
        "runs": runs,
    }
    out = options.out or Path("bench/results") / f"distill-{day:%Y-%m-%d}.json"
    write_atomic(out, json.dumps(result, indent=1) + "\n")
    if options.plot is not None:
        draw(runs, options.plot)
    for name, run in runs.items():
        first, last = run["held_out"][0], run["held_out"][-1]
        changed = {k: (first[k], last[k]) for k in first if isinstance(first[k], float)}
        print(f"{name}: {run['steps']} steps, {run['tokens']:,} tokens, {run['seconds']:.0f} s")
        for key, (before, after) in changed.items():
            print(f"  {key:18} {before:8.4f} -> {after:8.4f}")


if __name__ == "__main__":
    main()
