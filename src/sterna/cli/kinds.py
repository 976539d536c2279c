"""Which recipe and which task a kind of training has.

`train` knows its own kinds; those that compare answers live in `align`, which it may not import.
So the command line chooses, here, for every verb that trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sterna.core.errors import ConfigError

if TYPE_CHECKING:
    from sterna.train.config import Recipe
    from sterna.train.task import Task

OFFLINE = ("reward", "dpo", "kto")


def read(arguments: Sequence[str]) -> Recipe:
    """The recipe of files and `--a.b=c` overrides, of the class that its kind has."""
    from sterna.train.config import Recipe
    from sterna.train.recipe import make_recipe, read_layers

    files = [Path(word) for word in arguments if not word.startswith("--")]
    if not files:
        raise ConfigError(
            "no recipe given; write sterna train RECIPE.toml (sterna train --settings lists keys)"
        )
    values = read_layers(files, [word for word in arguments if word.startswith("--")])
    if values.get("kind") not in OFFLINE:
        return make_recipe(values, Recipe)
    from sterna.align.offline.config import OfflineRecipe

    return make_recipe(values, OfflineRecipe)


def task_of(recipe: Recipe) -> Task | None:
    """The task of a kind that `train` does not know; None = it knows."""
    if recipe.kind not in OFFLINE:
        return None
    from sterna.align.offline.config import OfflineRecipe
    from sterna.align.offline.task import choose_task

    assert isinstance(recipe, OfflineRecipe)
    return choose_task(recipe)
