"""report.html of a run of reinforcement learning: curves, alarms, answers, samples, settings."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sterna.align.answers import FILE as ANSWERS
from sterna.align.answers_page import answers_part
from sterna.align.auditor import audit
from sterna.align.changes import from_defaults
from sterna.align.config import RlRecipe
from sterna.align.records import SAMPLES
from sterna.align.rlhooks import RlHook
from sterna.core.log import get_logger
from sterna.core.machine import fingerprint
from sterna.core.rundir import write_atomic
from sterna.train.curves import Points, draw, smoothed
from sterna.train.metrics import FILE, read_metrics
from sterna.train.progress import duration
from sterna.train.report import fact_row, page, table
from sterna.version import __version__

if TYPE_CHECKING:
    from sterna.align.rltrainer import RlTrainer

_log = get_logger(__name__)
Line = dict[str, Any]
# Charts of several curves: title, the keys. A key of its own chart is smoothed over its raw values.
_TOGETHER: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "Policy",
        "share of tokens clipped",
        ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
    ),
    ("Policy", "importance ratio", ("ratio/min", "ratio/mean", "ratio/max")),
    (
        "Completions",
        "length in tokens",
        ("completions/min_length", "completions/mean_length", "completions/max_length"),
    ),
    ("Completions", "share of endings", ("completions/eos_ratio", "completions/clipped_ratio")),
    ("Completions", "sameness", ("completions/repetition", "completions/distinct_2")),
    (
        "Rollouts against trainer",
        "importance weight",
        tuple(f"sampling/importance_sampling_ratio/{which}" for which in ("min", "mean", "max")),
    ),
    (
        "Time",
        "seconds of a step",
        tuple(f"time/{name}" for name in ("prompts", "generate", "reward", "score", "train")),
    ),
)
# Where a key of its own chart belongs, by how it begins.
_SECTIONS = (
    ("Reward", ("reward", "frac_reward")),
    ("Policy", ("kl", "entropy", "loss", "grad_norm", "learning_rate", "approx_kl", "reverse_kl",
                "num_tokens")),
    ("Completions", ("completions/", "tools/", "prompts/")),
    ("Critic", ("value", "explained_variance")),
    ("Rollouts against trainer", ("sampling/", "drafts", "speculation")),
    ("Time", ("time/", "tokens_per_s", "samples_per_s")),
)  # fmt: skip
_LEFT_OUT = {"kind", "step", "completions/min_terminated_length", "clip_ratio/low_min",
             "clip_ratio/high_max", "completions/max_terminated_length"}  # fmt: skip
_SAID_TWICE = ("objective/", "policy/", "val/", "loss/")  # TRL's names of PPO's figures
_SAMPLED_STEPS = 12


class RlReport(RlHook):
    """Writes the report when the run has ended, after the hooks before it."""

    def on_end(self, trainer: RlTrainer) -> None:
        """From the run's files, so that it covers what a resumed run did before."""
        counters = trainer.counters
        facts = {
            "outcome": str(trainer.outcome),
            "steps": f"{counters.step:,} of {trainer.recipe.run.steps:,}",
            "completions": f"{counters.num_completions:,}",
            "time in steps": duration(counters.seconds),
        }
        path = trainer.recipe.run.output / "report.html"
        write_atomic(path, render(trainer.recipe, facts))
        _log.info("report: %s", path)


def render(recipe: RlRecipe, facts: dict[str, str]) -> str:
    """The page, from the files of `recipe.run.output`. `facts`: label -> value, shown on top."""
    folder = recipe.run.output
    lines = _read(folder / FILE)
    steps = [line for line in lines if line["kind"] == "step"]
    evals = [line for line in lines if line["kind"] == "eval"]
    rewards = [line["reward"] for line in steps if line.get("reward") is not None]
    if rewards:
        facts = {**facts, "reward": f"{rewards[0]:.3f} → {rewards[-1]:.3f}"}
    parts = [fact_row(facts), *_alarms(lines), *_curves(steps, evals)]
    answers = answers_part(_read(folder / ANSWERS))
    parts += ["<h2>Answers over steps</h2>", answers] if answers else []
    parts += _samples(_read(folder / SAMPLES))
    parts.append("<h2>Settings that differ from the defaults</h2>")
    parts.append(table(("key", "default", "value"), from_defaults(recipe)))
    subtitle = f"Sterna {__version__}, {recipe.algorithm.kind}; {fingerprint().line()}"
    return page(f"Alignment report: {folder.name}", subtitle, parts)


def _read(path: Path) -> list[Line]:
    return list(read_metrics(path)) if path.exists() else []


def _alarms(lines: Sequence[Line]) -> Iterator[str]:
    found = audit(lines)
    yield "<h2>Alarms</h2>"
    rows = ((str(alarm.step), alarm.kind, alarm.text) for alarm in found)
    yield table(("step", "kind", "what"), rows) if found else "<p class=dim>None.</p>"


def _curves(steps: Sequence[Line], evals: Sequence[Line]) -> Iterator[str]:
    """Headings with charts; what belongs nowhere is not lost."""
    charts: dict[str, list[str]] = {name: [] for name, _ in _SECTIONS}
    drawn = set(_LEFT_OUT)
    for section, title, keys in _TOGETHER:
        points = {key: _points(steps, key) for key in keys}
        lines: dict[str, Points] = {
            key.rpartition("/")[2]: found for key, found in points.items() if found
        }
        drawn |= set(keys)
        if lines:
            charts[section].append(draw(title, lines))
    for key in dict.fromkeys(name for line in (*steps, *evals) for name in line):
        if key not in drawn and not key.startswith(_SAID_TWICE):
            charts.setdefault(_section(key), []).append(_chart(key, steps, evals))
    for section, found in charts.items():
        if found:
            yield f"<h2>{html.escape(section)}</h2><div class=charts>{''.join(found)}</div>"


def _section(key: str) -> str:
    starts: Callable[[tuple[str, ...]], bool] = key.startswith
    return next((name for name, begins in _SECTIONS if starts(begins)), "Other")


def _chart(key: str, steps: Sequence[Line], evals: Sequence[Line]) -> str:
    raw, held_out = _points(steps, key), _points(evals, key)
    lines: dict[str, Points] = {"train (raw)": raw, "train": smoothed(raw)} if raw else {}
    return draw(key, lines | ({"held out": held_out} if held_out else {}))


def _points(lines: Sequence[Line], key: str) -> list[tuple[float, float]]:
    """Without the steps that have none, or one that is not finite (null)."""
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _samples(lines: Sequence[Line]) -> Iterator[str]:
    """Tables of a dozen steps, evenly spread, the last one open."""
    steps = list(dict.fromkeys(line["step"] for line in lines))
    count = min(_SAMPLED_STEPS, len(steps))
    chosen = {steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)}
    if chosen:
        yield "<h2>Samples by step</h2>"
    for step in sorted(chosen):
        rows = [
            (
                line["prompt"],
                line["completion"],
                _number(line["reward"]),
                _number(line["advantage"]),
            )
            for line in lines
            if line["step"] == step
        ]
        is_open = " open" if step == steps[-1] else ""
        shown = table(("prompt", "completion", "reward", "advantage"), rows)
        yield f"<details{is_open}><summary>step {step}</summary>{shown}</details>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
