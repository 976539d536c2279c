"""`sterna align`: learning from rewards, by a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sterna.cli.flags import AsJson
from sterna.core.errors import ConfigError
from sterna.core.log import setup_logging

if TYPE_CHECKING:
    from sterna.align.config import RlRecipe
    from sterna.align.rlresult import RlResult

# As shells have it: 128 + the signal's number.
_EXIT_OF = {"interrupted": 130, "terminated": 143}
_NOT_EQUAL = 10  # as `sterna train --verify` leaves


def align(
    *recipe: Annotated[str, Parameter(allow_leading_hyphen=True, show_default=False)],
    resume: Annotated[bool, Parameter(negative=())] = False,
    settings: Annotated[bool, Parameter(negative=())] = False,
    show: Annotated[bool, Parameter(negative=())] = False,
    replay: Path | None = None,
    as_json: AsJson = False,
) -> int:
    """Align a model by a recipe: PPO, GRPO, RLOO or REINFORCE on the hybrid engine.

    Parameters
    ----------
    recipe
        TOML files, layered left to right, and overrides such as --optim.lr=1e-6.
    resume
        Go on from the newest checkpoint of run.output, bit by bit on a CPU.
    settings
        List every setting of a recipe with its default, and stop.
    show
        Print the resolved recipe as TOML, and stop.
    replay
        Train one step again from its dump (run.dump = true; RUN/rollouts/step-*.safetensors) on the
        checkpoint before it, write nothing, and compare. Exit code 10 when its gradient norm or
        loss is another.
    as_json
        Print one JSON object of the result.
    """
    setup_logging()
    if settings:
        return _list_settings()
    chosen = _read(recipe)
    if show:
        from sterna.train.recipe import to_toml

        print(to_toml(chosen), end="")
        return 0
    return _run(chosen, resume, as_json) if replay is None else _replay(chosen, replay, as_json)


def _read(arguments: tuple[str, ...]) -> RlRecipe:
    from sterna.align.config import RlRecipe
    from sterna.train.recipe import make_recipe, read_layers

    files = [Path(word) for word in arguments if not word.startswith("--")]
    flags = [word for word in arguments if word.startswith("--")]
    if not files:
        raise ConfigError(
            "no recipe given; write sterna align RECIPE.toml (sterna align --settings lists keys)"
        )
    return make_recipe(read_layers(files, flags), RlRecipe)


def _run(recipe: RlRecipe, resume: bool, as_json: bool) -> int:
    from sterna.align.rl import align_rl

    if not as_json:
        _print_changes(recipe)
    result = align_rl(recipe, resume=resume)
    if as_json:
        print(json.dumps(_as_dict(result)))
    else:
        _print_result(result)
    return _EXIT_OF.get(result.outcome, 0)


def _replay(recipe: RlRecipe, dump: Path, as_json: bool) -> int:
    from sterna.align.replay import replay

    found = replay(recipe, dump)
    names = [name for name in found.now if name in found.then]
    if as_json:
        both = {name: [found.then[name], found.now[name]] for name in names}
        print(json.dumps({"is_identical": found.is_identical, "figures": both}))
    else:
        rows = ((name, f"{found.then[name]!r}", f"{found.now[name]!r}") for name in names)
        _print_table(("figure", "then", "now"), rows)
        print("identical" if found.is_identical else "not identical: gradient norm or loss differ")
    return 0 if found.is_identical else _NOT_EQUAL


def _as_dict(result: RlResult) -> dict[str, Any]:
    return {
        "outcome": result.outcome,
        "steps": result.steps,
        "reward": result.reward,
        "eval_reward": result.eval_reward,
        "model": str(result.model),
        "checkpoint": None if result.checkpoint is None else str(result.checkpoint),
    }


def _print_changes(recipe: RlRecipe) -> None:
    """What the recipe sets, beside the default it replaces."""
    from sterna.align.build import changed
    from sterna.align.config import PromptSection, RlRecipe

    prompts = PromptSection(task="-")  # has no default: "-" stands for none
    found = changed(RlRecipe(prompts=prompts), recipe)
    rows = [(key, "" if old is None else str(old), str(new)) for key, (old, new) in found.items()]
    _print_table(("setting", "default", "value"), rows, to_stderr=True)


def _print_result(result: RlResult) -> None:
    reward = "" if result.reward is None else f", reward {result.reward:.4f}"
    held_out = "" if result.eval_reward is None else f", held-out reward {result.eval_reward:.4f}"
    print(f"{result.outcome} after {result.steps} steps{reward}{held_out}")
    if result.outcome in _EXIT_OF:
        print(f"saved in {result.checkpoint}; go on with the same command and --resume")
    else:
        print(f"model: {result.model} (sterna chat {result.model})")


def _list_settings() -> int:
    from sterna.align.config import RlRecipe
    from sterna.train.settings import all_settings

    found = all_settings(RlRecipe)
    _print_table(("setting", "default", "meaning"), ((s.name, s.default, s.meaning) for s in found))
    return 0


def _print_table(heads: tuple[str, ...], rows: Any, to_stderr: bool = False) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*heads, box=None, header_style="bold")
    for row in rows:
        table.add_row(*row)
    Console(stderr=to_stderr, highlight=False, markup=False).print(table)
