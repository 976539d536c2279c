"""report.html: one file that says what a run did: curves, settings, samples. Loads nothing."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sterna.core.log import get_logger
from sterna.core.machine import fingerprint
from sterna.core.rundir import write_atomic
from sterna.train.config import Recipe
from sterna.train.curves import Points, draw, smoothed
from sterna.train.hooks import Hook
from sterna.train.metrics import FILE, read_metrics
from sterna.train.progress import duration
from sterna.train.recipe import changes
from sterna.version import __version__

if TYPE_CHECKING:
    from sterna.train.trainer import Trainer

# (model folder, prompts, longest answer in tokens) -> answers
Generate = Callable[[Path, Sequence[str], int], Sequence[str]]
_log = get_logger(__name__)
# Keys of every run's metrics; what a kind of training adds has charts of its own.
_COMMON = {
    "kind", "step", "loss", "grad_norm", "lr", "tokens", "targets", "seconds", "data_seconds",
    "tokens_per_s", "mfu", "memory_gib",
}  # fmt: skip

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --dim: #667; --line: #d6dae2; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --dim: #9aa3b2; --line: #3a4252; --page: #171b22; }
  svg { filter: invert(0.88) hue-rotate(180deg); } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.dim { color: var(--dim); }
.facts { display: flex; flex-wrap: wrap; gap: .6rem 2.2rem; margin: 1.2rem 0; }
.facts b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: .8rem; }
.charts svg { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid var(--line); }
td, pre { overflow-wrap: anywhere; white-space: pre-wrap; }
code, pre { font: 13px/1.45 ui-monospace, monospace; margin: 0; }
"""


class Report(Hook):
    """Writes the report when the run has ended. `generate` answers the sample prompts."""

    def __init__(self, generate: Generate | None) -> None:
        self._generate = generate

    def on_end(self, trainer: Trainer) -> None:
        """Write report.html; the samples come from the model that was just written."""
        settings = trainer.recipe.log
        samples: list[tuple[str, str]] = []
        if self._generate is not None and settings.sample_prompts:
            prompts = settings.sample_prompts
            answers = self._generate(trainer.output / "model", prompts, settings.sample_tokens)
            samples = list(zip(prompts, answers, strict=True))
        path = trainer.output / "report.html"
        own = "".join(hook.report(trainer) for hook in trainer.parts.hooks)
        write_atomic(path, render(trainer.recipe, _facts(trainer), samples, own))
        _log.info("report: %s", path)


def render(
    recipe: Recipe,
    facts: dict[str, str],
    samples: Sequence[tuple[str, str]] = (),
    own: str = "",
) -> str:
    """The page, from the run folder's metrics.jsonl. `facts`: label -> value, shown on top; `own`:
    HTML of the kind of training."""
    lines = list(read_metrics(recipe.run.output / FILE))
    steps = [line for line in lines if line["kind"] == "step"]
    evals = [line for line in lines if line["kind"] == "eval"]
    subtitle = f"Sterna {__version__}, {recipe.kind}; {fingerprint().line()}"
    title = f"Training report: {recipe.run.output.name}"
    parts = [
        fact_row(facts),
        f"<div class=charts>{''.join(_charts(steps, evals))}</div>",
        own,
        "<h2>Settings that differ from the defaults</h2>",
        table(("key", "default", "value"), _setting_rows(recipe)),
    ]
    if samples:
        parts += ["<h2>Samples</h2>", table(("prompt", "answer"), samples)]
    return page(title, subtitle, parts)


def page(title: str, subtitle: str, parts: Sequence[str]) -> str:
    """A page of HTML parts, with the style of every report; it loads nothing."""
    heads = [f"<h1>{html.escape(title)}</h1>", f"<p class=dim>{html.escape(subtitle)}</p>"]
    body = "\n".join((*heads, *parts))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _facts(trainer: Trainer) -> dict[str, str]:
    counters, recipe = trainer.counters, trainer.recipe
    rate = counters.num_tokens / counters.seconds if counters.seconds else 0.0
    facts = {
        "outcome": str(trainer.outcome),
        "steps": f"{counters.step:,} of {recipe.run.steps:,}",
        "tokens": f"{counters.num_tokens:,}",
        "trained tokens": f"{counters.num_targets:,}",
        "rows filled": f"{100 * trainer.parts.loader.counts.fill:.1f} %",
        "time in steps": duration(counters.seconds),
        "tokens/s": f"{rate:,.0f}",
    }
    bad = trainer.parts.loader.counts.of["bad_rows"]
    facts |= {"bad rows skipped": f"{bad:,}"} if bad else {}
    if trainer.last is not None:
        facts["last loss"] = f"{trainer.last.loss:.4f}"
    if counters.best_loss is not None:
        facts["best eval loss"] = f"{counters.best_loss:.4f} (step {counters.best_step})"
    return facts


def _charts(steps: list[dict[str, Any]], evals: list[dict[str, Any]]) -> Iterable[str]:
    if not steps and not evals:
        return
    loss = _points(steps, "loss")
    held_out = {"held out": _points(evals, "loss")} if evals else {}
    yield draw("loss", {"train (raw)": loss, "train": smoothed(loss), **held_out})
    for key, title in (
        ("lr", "learning rate"),
        ("grad_norm", "gradient norm before clipping"),
        ("tokens_per_s", "tokens/s"),
    ):
        yield draw(title, {key: _points(steps, key)})
    for key in dict.fromkeys(name for line in (*steps, *evals) for name in line):
        if key not in _COMMON:
            raw = _points(steps, key)
            lines = {"train (raw)": raw, "train": smoothed(raw)} if raw else {}
            yield draw(key, lines | ({"held out": _points(evals, key)} if evals else {}))


def _points(lines: list[dict[str, Any]], key: str) -> Points:
    return [(line["step"], line[key]) for line in lines if key in line]


def _setting_rows(recipe: Recipe) -> list[tuple[str, str, str]]:
    return [(key, _show(old), _show(new)) for key, (old, new) in changes(recipe).items()]


def _show(value: Any) -> str:
    return "" if value is None else str(value)


def fact_row(facts: dict[str, str]) -> str:
    """Numbers with their labels, in a row."""
    cells = (f"<div>{html.escape(k)}<b>{html.escape(v)}</b></div>" for k, v in facts.items())
    return f"<div class=facts>{''.join(cells)}</div>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of texts."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
