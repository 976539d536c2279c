"""All runs of a task as one JSON file, one picture and one table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiment import Experiment
from probe import FILE

from sterna.align.auditor import audit
from sterna.core.machine import fingerprint
from sterna.core.rundir import write_atomic
from sterna.train.metrics import read_metrics

RESULTS, PICTURES = Path("bench/results"), Path("docs/img")
# What is kept of every step.
STEP_FIGURES = (
    "reward", "rewards/gold/mean", "kl", "entropy", "completions/eos_ratio",
    "completions/mean_length", "completions/distinct_2", "frac_reward_zero_std", "ratio/max",
    "clip_ratio/low_mean", "clip_ratio/high_mean", "grad_norm", "value_loss", "explained_variance",
    "sampling/sampling_logp_difference/max", "time/step",
)  # fmt: skip
_DIGITS = 4


def gather(experiment: Experiment, folder: Path) -> None:
    """Read the runs in `folder`, write the result and the picture, print the table."""
    runs = {run.parent.name: read_run(run.parent) for run in sorted(folder.glob(f"*/{FILE}"))}
    if not runs:
        raise SystemExit(f"{folder}: no run yet")
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": fingerprint().as_dict(),
        "command": f"python bench/align/learning.py {experiment.name} --variant V --seed N",
        "about": experiment.about,
        "targets": [str(target) for target in experiment.targets],
        "runs": {name: {**run, "met": judged(experiment, run)} for name, run in runs.items()},
    }
    name = f"learning-{experiment.name}"
    write_atomic(RESULTS / f"{name}.json", json.dumps(result) + "\n")
    draw(experiment, runs, PICTURES / f"{name}.png")
    print(table(experiment, runs))


def read_run(folder: Path) -> dict[str, Any]:
    """One run's curves, alarms and what its preparation said."""
    lines = list(read_metrics(folder / "metrics.jsonl"))
    steps = [line for line in lines if line["kind"] == "step"]
    return {
        "steps": len(steps),
        "curves": {
            figure: [_short(line.get(figure)) for line in steps]
            for figure in STEP_FIGURES
            if steps and figure in steps[0]
        },
        "measured": list(read_metrics(folder / FILE)),
        "alarms": [[a.step, a.kind, dict(a.figures)] for a in audit(lines)],
        "facts": _facts(folder),
    }


def _facts(folder: Path) -> dict[str, Any]:
    """Of the preparation, without paths of this machine."""
    seed = folder.name.rpartition("-")[2]
    for base in (folder.parent / f"base-{seed}", folder.parent / "base"):
        if (base / "facts.json").exists():
            found = json.loads((base / "facts.json").read_text())
            return {k: v for k, v in found.items() if k not in ("model", "reward_model")}
    return {}


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)


def measured(run: Mapping[str, Any], part: str = "eval") -> list[dict[str, Any]]:
    """The measurements of one part, in order."""
    return [line for line in run["measured"] if line["part"] == part]


def judged(experiment: Experiment, run: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each target is met by the last measurement."""
    first, last = measured(run)[0], measured(run)[-1]
    return {
        str(target): target.is_met(first[target.figure], last[target.figure])
        for target in experiment.targets
    }


def _verdict(experiment: Experiment, name: str, run: Mapping[str, Any]) -> str:
    """Of a reward to be fooled: when that was noticed."""
    if name.startswith("hacking"):
        found = [step for step, kind, _ in run["alarms"] if kind == "gold"]
        return f"gold alarm at step {found[0]}" if found else "no gold alarm"
    return "met" if all(judged(experiment, run).values()) else "missed"


def table(experiment: Experiment, runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Start and end of every run, on held-out prompts; the end on trained ones in brackets."""
    figures = dict.fromkeys(
        [*(target.figure for target in experiment.targets), *experiment.shown, "pass@8", "length"]
    )
    kept = [f for f in figures if all(f in line for r in runs.values() for line in measured(r))]
    rows = ["| run | steps | CPU min | " + " | ".join(kept) + " | targets |"]
    rows.append("|---" * (len(kept) + 4) + "|")
    for name, run in runs.items():
        first, last = measured(run)[0], measured(run)[-1]
        trained = measured(run, "train")
        cells = [
            f"{first[f]:.3g} -> {last[f]:.3g}" + (f" ({trained[-1][f]:.3g})" if trained else "")
            for f in kept
        ]
        minutes = f"{last['cpu_minutes']:.1f}"
        what = " | ".join([*cells, _verdict(experiment, name, run)])
        rows.append(f"| {name} | {run['steps']} | {minutes} | {what} |")
    return "\n".join([*rows, *(f"target: {target}" for target in experiment.targets)])


def draw(experiment: Experiment, runs: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A panel a figure, a line a run, a colour a variant; an upright line a gold alarm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = experiment.shown
    figure, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.4), squeeze=False)
    variants = list(dict.fromkeys(name.rpartition("-")[0] for name in runs))
    bounds = {t.figure: t.bound for t in experiment.targets if not t.is_rise}
    for axis, name in zip(axes[0], shown, strict=True):
        _panel(axis, name, runs, variants)
        if name in bounds:
            axis.axhline(bounds[name], color="black", lw=0.8, ls=":")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("steps")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _panel(
    axis: Any, figure: str, runs: Mapping[str, Mapping[str, Any]], variants: Sequence[str]
) -> None:
    labelled: set[str] = set()
    for name, run in runs.items():
        variant = name.rpartition("-")[0]
        lines = measured(run)
        if figure in lines[0]:
            xs, ys = [x["step"] for x in lines], [x[figure] for x in lines]
        else:
            ys = run["curves"].get(figure, [])
            xs = list(range(1, len(ys) + 1))
        label = None if variant in labelled else variant
        labelled.add(variant)
        colour = f"C{variants.index(variant)}"
        axis.plot(xs, ys, lw=1.3, color=colour, label=label)
        for step in (step for step, kind, _ in run["alarms"] if kind == "gold"):
            label = None if "gold" in labelled else "alarm: gold"
            labelled.add("gold")
            axis.axvline(step, color=colour, lw=1.0, ls="--", label=label)
