"""`sterna align` of a recipe with steps: runs them and prints the table of what came of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sterna.align.pipeline.config import AlignRecipe
    from sterna.align.pipeline.run import PipelineResult

# As shells have it: 128 + the signal's number.
EXIT_OF = {"interrupted": 130, "terminated": 143}


def run_pipeline(recipe: AlignRecipe, resume: bool, as_json: bool) -> int:
    """Run it and say what came of it; the exit code."""
    from sterna.align.pipeline.run import align_pipeline
    from sterna.cli.train_samples import generate

    result = align_pipeline(recipe, resume=resume, generate=generate)
    if os.environ.get("RANK", "0") != "0":
        return EXIT_OF.get(result.outcome, 0)
    if as_json:
        table = None if result.table is None else asdict(result.table)
        told = {"outcome": result.outcome, "step": result.step, "model": str(result.model)}
        print(json.dumps({**told, "table": table}, ensure_ascii=False))
    else:
        _print_result(recipe, result)
    return EXIT_OF.get(result.outcome, 0)


def _print_result(recipe: AlignRecipe, result: PipelineResult) -> None:
    if result.table is None:
        print(f"{result.outcome} in step {result.step}; go on with the same command and --resume")
        return
    print_table(("", "before step 3", "after"), result.table.rows())
    print(f"report: {result.output / 'report.html'}")
    chat = "" if result.step == "reward" else f" (sterna chat {result.model})"
    print(f"model: {result.model}{chat}")


def print_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], to_stderr: bool = False
) -> None:
    """A plain table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*heads, box=None, header_style="bold")
    for row in rows:
        table.add_row(*row)
    Console(stderr=to_stderr, highlight=False, markup=False).print(table)
