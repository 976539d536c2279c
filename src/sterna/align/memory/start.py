"""The check before a run begins: its plan against its budget, and what is then done about it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sterna.align.config import RlRecipe
from sterna.align.memory.config import MemorySection
from sterna.align.memory.fit import Budget, Change, RlPlan, changed_recipe, plan_rl
from sterna.core.errors import ConfigError
from sterna.core.log import get_logger
from sterna.core.machine import available_memory_bytes
from sterna.train import checkpoint
from sterna.train.autoplan import free_memory
from sterna.train.plan import GIB

_log = get_logger(__name__)
# What a resumed run keeps: the order of a sum follows from the first, and a checkpoint names both.
STICKY = ("algorithm.micro_tokens", "rollout.weights")


def budget_of(memory: MemorySection, device: str, output: Path) -> Budget:
    """What the recipe states, else what is free now; of ranks on one machine an even share."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = available_memory_bytes() / ranks
    disk = float(shutil.disk_usage(_existing(memory.folder or output)).free)
    if device == "cpu":
        return Budget(memory.budget_gb * 1e9 or free, 0.0, disk)
    host = memory.host_gb * 1e9 or free
    return Budget(memory.budget_gb * 1e9 or free_memory(device), host, disk)


def placed(recipe: RlRecipe, source: Path | None = None) -> RlRecipe:
    """The recipe as it may run: itself where it fits, or (memory.fit = "adapt") as it would.

    ConfigError, before any work, for a plan over a stated budget, naming what would fit; without a
    stated budget a warning. `source`: the checkpoint that is continued, whose placement stays.
    """
    adapts = recipe.memory.fit == "adapt"
    keeps = _kept(recipe, source) if adapts and source is not None else {}
    recipe = changed_recipe(recipe, keeps) if keeps else recipe
    budget = budget_of(recipe.memory, recipe.model.device, recipe.run.output)
    found = plan_rl(recipe, budget, fixed=STICKY if source is not None else ())
    if found.reasons:
        _refuse(recipe, found)
        return recipe
    if found.changes and not adapts:
        _refuse(recipe, found)
        return recipe
    if found.changes:
        _log.warning("memory: adapted to fit: %s", told(found.changes))
    _log.info("memory: %.2f GiB of %.2f in the phase %s", found.peak / GIB, budget.device / GIB,
              found.needs.peak_phase)  # fmt: skip
    return found.recipe


def told(change: Change) -> str:
    """A change in words that may be put behind a recipe's name."""
    return ", ".join(f"{key} = {value}" for key, value in change.items())


def advice(found: RlPlan) -> str:
    """What would fit; empty where nothing was found."""
    if not found.reasons:
        return f"it would fit with {told(found.changes)}"
    return "; or ".join(f"it would fit with {told(change)}" for change, _ in found.proposals[:1])


def _refuse(recipe: RlRecipe, found: RlPlan) -> None:
    """ConfigError over a stated budget, else a warning."""
    lacking = "; ".join(found.reasons or found.lacking)
    what = f"the run does not fit into its memory: {lacking}"
    how = advice(found)
    if found.changes and not found.reasons:
        how += ' (memory.fit = "adapt" does that)'
    if recipe.memory.budget_gb:
        raise ConfigError(
            f"{what}; {how or 'raise memory.budget_gb'}. `sterna plan` shows all parts",
            param="memory.budget_gb",
        )
    _log.warning("%s; %s. It is tried all the same, as memory.budget_gb is not set", what,
                 how or "it may be ended by the system")  # fmt: skip


def _kept(recipe: RlRecipe, source: Path) -> Change:
    """The placement of a checkpoint that its run goes on with."""
    saved = RlRecipe.model_validate(checkpoint.read_meta(source)["recipe"])
    values = {
        "algorithm.micro_tokens": saved.algorithm.micro_tokens,
        "rollout.weights": saved.rollout.weights,
    }
    now = {
        "algorithm.micro_tokens": recipe.algorithm.micro_tokens,
        "rollout.weights": recipe.rollout.weights,
    }
    return {key: value for key, value in values.items() if now[key] != value}


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
