"""`sterna train`: run a recipe."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sterna.cli.kinds import OFFLINE, read, task_of
from sterna.core.errors import ConfigError
from sterna.core.log import setup_logging

if TYPE_CHECKING:
    from sterna.train.config import Recipe
    from sterna.train.result import TrainResult

# As shells have it: 128 + the signal's number.
_EXIT_OF = {"interrupted": 130, "terminated": 143}


def train(
    *recipe: Annotated[str, Parameter(allow_leading_hyphen=True, show_default=False)],
    resume: Annotated[bool, Parameter(negative=())] = False,
    settings: Annotated[bool, Parameter(negative=())] = False,
    show: Annotated[bool, Parameter(negative=())] = False,
    verify: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Train a model by a recipe: fine-tuning, pretraining, distillation, reward models, DPO, KTO.

    On several processes: torchrun --nproc-per-node N -m sterna.cli train RECIPE.toml

    Parameters
    ----------
    recipe
        TOML files, layered left to right, and overrides such as --optim.lr=1e-4.
    resume
        Go on from the newest checkpoint of run.output, bit by bit on a CPU.
    settings
        List every setting of a recipe with its default, and stop.
    show
        Print the resolved recipe as TOML, and stop.
    verify
        Compare every feature of the recipe with plain training at small size, write parity.json
        and parity.txt to run.output, and stop. Exit code 10 when something differs.
    """
    setup_logging()
    if settings:
        return _list_settings()
    chosen = read(recipe)
    if show:
        from sterna.train.recipe import to_toml

        print(to_toml(chosen), end="")
        return 0
    return _verify(chosen) if verify else _run(chosen, resume)


def _verify(recipe: Recipe) -> int:
    from rich.console import Console

    from sterna.train.verify import verify

    if recipe.kind in OFFLINE:
        raise ConfigError(f"--verify compares training on texts; it has no kind = {recipe.kind}")
    console = Console(stderr=True, highlight=False, markup=False)
    with console.status("plain training") as status:
        certificate = verify(recipe, status.update)
    certificate.save(recipe.run.output)
    print(certificate.text(), end="")
    certificate.require()
    return 0


def _run(recipe: Recipe, resume: bool) -> int:
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        _print_changes(recipe)
    from sterna.cli.train_samples import generate
    from sterna.train.loop import train as run

    task = task_of(recipe)
    result = run(_on_own_text(recipe), resume=resume, generate=generate, task=task)
    if is_main:
        _print_result(result, recipe.kind not in ("distill", "reward"))
    return _EXIT_OF.get(result.outcome, 0)


def _on_own_text(recipe: Recipe) -> Recipe:
    """The recipe, on text that its model has written where it asks for that."""
    if recipe.kind != "distill" or not recipe.distill.generate:
        return recipe
    if (
        int(os.environ.get("WORLD_SIZE", "1")) > 1
        and not (recipe.run.output / "generated").exists()
    ):
        raise ConfigError(
            "distill.generate writes its text in one process; start the run without torchrun once, "
            "then go on with --resume"
        )
    from sterna.cli.generate_ids import generate_ids
    from sterna.train.distill.generated import with_generated

    return with_generated(recipe, generate_ids)


def _print_changes(recipe: Recipe) -> None:
    """What the recipe sets, beside the default it replaces."""
    from rich.console import Console
    from rich.table import Table

    from sterna.train.recipe import changes

    table = Table("setting", "default", "value", box=None, header_style="bold")
    for key, (default, value) in changes(recipe).items():
        table.add_row(key, "" if default is None else str(default), str(value))
    Console(stderr=True, highlight=False, markup=False).print(table)


def _print_result(result: TrainResult, can_chat: bool) -> None:
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    held_out = "" if result.eval_loss is None else f", held-out loss {result.eval_loss:.4f}"
    print(f"{result.outcome} after {result.steps} steps{loss}{held_out}")
    if result.outcome in _EXIT_OF:
        print(f"saved in {result.checkpoint}; go on with the same command and --resume")
    else:
        print(f"model: {result.model}" + (f" (sterna chat {result.model})" if can_chat else ""))


def _list_settings() -> int:
    from rich.console import Console
    from rich.table import Table

    from sterna.align.offline.config import OfflineRecipe
    from sterna.train.settings import all_settings

    table = Table("setting", "default", "meaning", box=None, header_style="bold")
    for setting in all_settings(OfflineRecipe):
        table.add_row(setting.name, setting.default, setting.meaning)
    Console(highlight=False, markup=False).print(table)
    return 0
