"""report.html of a pipeline: the table of what came of it, curves of the steps, answers."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sterna.align.pipeline.config import AlignRecipe
from sterna.align.pipeline.inherit import FOLDERS
from sterna.align.pipeline.outcome import Outcome
from sterna.core.rundir import write_atomic
from sterna.train.curves import Points, draw, smoothed
from sterna.train.metrics import FILE, read_metrics
from sterna.train.report import page, table

# Of each step's metrics.jsonl: key, title.
_CURVES = {
    "sft": (("loss", "step 1: loss"),),
    "reward": (("loss", "step 2: loss"), ("accuracy", "step 2: accuracy")),
    "rl": (
        ("reward", "step 3: reward"),
        ("rewards/gold/mean", "step 3: gold metric"),
        ("kl", "step 3: KL to the start, nats an answer"),
        ("completions/mean_length", "step 3: tokens of an answer"),
        ("entropy", "step 3: entropy"),
        ("explained_variance", "step 3: explained variance of the critic"),
    ),
}


def write_report(recipe: AlignRecipe, outcome: Outcome) -> Path:
    """Write it into the run's folder."""
    path = recipe.run.output / "report.html"
    parts = [
        table(("", "before step 3", "after"), outcome.rows()),
        f"<div class=charts>{''.join(_charts(recipe))}</div>",
        *_links(recipe),
    ]
    if outcome.comparison is not None and outcome.comparison.samples:
        parts.append("<h2>Answers to held-out prompts</h2>")
        parts.append(table(("prompt", "before", "after"), outcome.comparison.samples))
    write_atomic(path, page(f"Alignment report: {recipe.run.output.name}", "", parts))
    return path


def _charts(recipe: AlignRecipe) -> Iterator[str]:
    for step, curves in _CURVES.items():
        lines = list(read_metrics(recipe.folder(step) / FILE))
        for key, title in curves:
            raw, held_out = _points(lines, key, "step"), _points(lines, key, "eval")
            found: dict[str, Points] = {"held out": held_out} if held_out else {}
            if raw:
                found |= {"train (raw)": raw, "train": smoothed(raw)}
            if found:
                yield draw(title, found)


def _points(lines: Sequence[dict[str, Any]], key: str, kind: str) -> Points:
    return [(line["step"], line[key]) for line in lines if key in line and line["kind"] == kind]


def _links(recipe: AlignRecipe) -> Iterator[str]:
    """To the reports of the steps."""
    for step, folder in FOLDERS.items():
        if (recipe.folder(step) / "report.html").is_file():
            yield f'<p><a href="{html.escape(folder)}/report.html">{html.escape(folder)}</a></p>'
