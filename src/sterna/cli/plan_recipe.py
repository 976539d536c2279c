"""`sterna plan RECIPE`: what a recipe's run takes, step by step and phase by phase."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sterna.align.memory.fit import Budget
    from sterna.align.memory.steps import StepPlan


def plan_recipe_files(
    words: Sequence[str], memory: float, host: float, disk: float, as_json: bool
) -> int:
    """Plan TOML files and `key=value` words; exit code 1 when a step does not fit.

    `memory`, `host` and `disk` in bytes replace what the recipe says and the machine has; 0 = not.
    """
    from sterna.align.memory.steps import plan_recipe

    recipe = _read(words)
    budget = _budget(recipe, memory, host, disk)
    plans = plan_recipe(recipe, budget)
    if as_json:
        print(json.dumps(_as_dict(plans, budget), indent=2))
    else:
        _show(plans, budget)
    return 1 if any(plan.reasons for plan in plans) else 0


def _read(words: Sequence[str]) -> Any:
    from sterna.align.config import RlRecipe
    from sterna.align.pipeline.config import AlignRecipe
    from sterna.align.pipeline.inherit import FOLDERS
    from sterna.cli import kinds
    from sterna.train.recipe import make_recipe, read_layers

    files = [Path(word) for word in words if word.endswith(".toml")]
    flags = [f"--{word.removeprefix('--')}" for word in words if not word.endswith(".toml")]
    values = read_layers(files, flags)
    if values.keys() & {"steps", *FOLDERS} and "kind" not in values:
        return make_recipe(values, AlignRecipe)
    if values.keys() & {"prompts", "rollout", "algorithm"}:
        return make_recipe(values, RlRecipe)
    return kinds.read([str(file) for file in files] + flags)


def _budget(recipe: Any, memory: float, host: float, disk: float) -> Budget:
    from sterna.align.memory.config import MemorySection
    from sterna.align.memory.fit import Budget
    from sterna.align.memory.start import budget_of

    if memory:
        return Budget(memory, host or float("inf"), disk or float("inf"))
    section, device, output = (
        getattr(recipe, "memory", None),
        recipe.model.device,
        recipe.run.output,
    )
    found = budget_of(section or MemorySection(), device, output)
    return Budget(found.device, host or found.host, disk or found.disk)


def _as_dict(plans: Sequence[StepPlan], budget: Budget) -> dict[str, Any]:
    return {
        "fits": not any(plan.reasons for plan in plans),
        "budget_bytes": budget.device,
        "steps": [
            {
                "step": plan.step,
                "fits": not plan.reasons,
                "peak_bytes": {"expected": plan.needs.peak, "with_margin": plan.peak},
                "peak_in": plan.needs.peak_phase,
                "phases": {name: plan.needs.of(name) for name in plan.needs.phases},
                "held": plan.needs.held,
                "beside": plan.needs.phases,
                "workers": plan.needs.workers,
                "host": plan.needs.host,
                "disk": plan.needs.disk,
                "changes": plan.changes,
                "lacking": list(plan.lacking),
                "reasons": list(plan.reasons),
                "would_fit": [
                    {"changes": change, "peak_bytes": peak} for change, peak in plan.proposals
                ],
            }
            for plan in plans
        ],
    }


def _show(plans: Sequence[StepPlan], budget: Budget) -> None:
    from rich.console import Console

    from sterna.train.plan import GIB, MEMORY_ERROR

    console = Console(highlight=False)
    for plan in plans:
        head = "[red]does not fit[/red]" if plan.reasons else "[green]fits[/green]"
        console.print(
            f"{plan.step}: {plan.peak / GIB:.2f} GiB with the margin of {MEMORY_ERROR:.0%}, "
            f"{budget.device / GIB:.2f} are there: {head}"
        )
        _explain(console, plan)
        console.print(_table(plan))
    console.print(
        "Counted from sizes (align/memory); prompts of any length up to prompts.max_tokens. For "
        "GPUs nothing of this was measured.",
        style="dim",
    )


def _explain(console: Any, plan: StepPlan) -> None:
    from sterna.align.memory.start import told
    from sterna.train.plan import GIB

    for reason in plan.lacking:
        console.print(f"  as the recipe is: {reason}")
    if plan.changes:
        word = "the most frugal placement" if plan.reasons else 'memory.fit = "adapt" sets'
        console.print(f"  {word}: {told(plan.changes)}")
    for reason in plan.reasons if plan.changes else ():
        console.print(f"  with that: {reason}")
    for change, peak in plan.proposals:
        console.print(f"  would fit: {told(change)} ({peak / GIB:.2f} GiB)")


def _table(plan: StepPlan) -> Any:
    from rich.table import Table

    from sterna.train.plan import GIB

    table = Table("GiB", *plan.needs.phases, box=None)
    for name, value in {**plan.needs.held, **plan.needs.workers}.items():
        table.add_row(name, *[f"{value / GIB:.2f}"] * len(plan.needs.phases))
    names = dict.fromkeys(name for parts in plan.needs.phases.values() for name in parts)
    for name in names:
        cells = [parts.get(name) for parts in plan.needs.phases.values()]
        table.add_row(name, *("" if cell is None else f"{cell / GIB:.2f}" for cell in cells))
    sums = [plan.needs.of(phase) for phase in plan.needs.phases]
    table.add_row("together", *(f"{value / GIB:.2f}" for value in sums), style="bold")
    for where, parts in (("host", plan.needs.host), ("disk", plan.needs.disk)):
        for name, value in parts.items():
            if value:
                table.add_row(f"on {where}: {name}", f"{value / GIB:.2f}")
    return table
