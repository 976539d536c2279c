"""`sterna align`: learning from rewards, by a recipe."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sterna.cli.align_pipeline import EXIT_OF, print_table, run_pipeline
from sterna.cli.flags import AsJson
from sterna.core.errors import ConfigError
from sterna.core.log import setup_logging

if TYPE_CHECKING:
    from sterna.align.config import RlRecipe
    from sterna.align.pipeline.config import AlignRecipe
    from sterna.align.rlresult import RlResult

_NOT_EQUAL = 10  # as `sterna train --verify` leaves


def align(
    *recipe: Annotated[str, Parameter(allow_leading_hyphen=True, show_default=False)],
    resume: Annotated[bool, Parameter(negative=())] = False,
    settings: Annotated[bool, Parameter(negative=())] = False,
    show: Annotated[bool, Parameter(negative=())] = False,
    replay: Path | None = None,
    as_json: AsJson = False,
) -> int:
    """Align a model by a recipe: fine-tuning, a reward model and PPO, or one of these.

    A recipe with tables [sft], [reward] and [rl] has up to three steps, one after the other; any
    other is reinforcement learning alone: PPO, GRPO, RLOO or REINFORCE on the hybrid engine.

    Parameters
    ----------
    recipe
        TOML files, layered left to right, and overrides such as --optim.lr=1e-6.
    resume
        Go on from the newest checkpoint of run.output, bit by bit on a CPU; finished steps stay.
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
    from sterna.align.config import RlRecipe

    if isinstance(chosen, RlRecipe):
        return _run(chosen, resume, as_json) if replay is None else _replay(chosen, replay, as_json)
    if replay is not None:
        raise ConfigError("--replay is of a step of [rl]; give the recipe.toml of its folder 3-rl")
    return run_pipeline(chosen, resume, as_json)


def _read(arguments: tuple[str, ...]) -> RlRecipe | AlignRecipe:
    from sterna.align.config import RlRecipe
    from sterna.align.pipeline.config import AlignRecipe
    from sterna.align.pipeline.inherit import FOLDERS
    from sterna.train.recipe import make_recipe, read_layers

    files = [Path(word) for word in arguments if not word.startswith("--")]
    flags = [word for word in arguments if word.startswith("--")]
    if not files:
        raise ConfigError(
            "no recipe given; write sterna align RECIPE.toml (sterna align --settings lists keys)"
        )
    values = read_layers(files, flags)
    if values.keys() & {"steps", *FOLDERS}:
        return make_recipe(values, AlignRecipe)
    return make_recipe(values, RlRecipe)


def _run(recipe: RlRecipe, resume: bool, as_json: bool) -> int:
    from sterna.align.rl import align_rl

    is_main = os.environ.get("RANK", "0") == "0"
    if is_main and not as_json:
        _print_changes(recipe)
    result = align_rl(recipe, resume=resume)
    if not is_main:
        return EXIT_OF.get(result.outcome, 0)
    if as_json:
        print(json.dumps(_as_dict(result)))
    else:
        _print_result(result)
    return EXIT_OF.get(result.outcome, 0)


def _replay(recipe: RlRecipe, dump: Path, as_json: bool) -> int:
    from sterna.align.replay import replay

    found = replay(recipe, dump)
    names = [name for name in found.now if name in found.then]
    if as_json:
        both = {name: [found.then[name], found.now[name]] for name in names}
        print(json.dumps({"is_identical": found.is_identical, "figures": both}))
    else:
        rows = ((name, f"{found.then[name]!r}", f"{found.now[name]!r}") for name in names)
        print_table(("figure", "then", "now"), rows)
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
    from sterna.align.changes import from_defaults

    print_table(("setting", "default", "value"), from_defaults(recipe), to_stderr=True)


def _print_result(result: RlResult) -> None:
    reward = "" if result.reward is None else f", reward {result.reward:.4f}"
    held_out = "" if result.eval_reward is None else f", held-out reward {result.eval_reward:.4f}"
    print(f"{result.outcome} after {result.steps} steps{reward}{held_out}")
    if result.outcome in EXIT_OF:
        print(f"saved in {result.checkpoint}; go on with the same command and --resume")
    else:
        print(f"model: {result.model} (sterna chat {result.model})")


def _list_settings() -> int:
    from sterna.align.config import RlRecipe
    from sterna.align.pipeline.settings import pipeline_settings
    from sterna.train.settings import all_settings

    heads = ("setting", "default", "meaning")
    print("One table, reinforcement learning:")
    print_table(heads, ((s.name, s.default, s.meaning) for s in all_settings(RlRecipe)))
    print("\nThree steps:")
    print_table(heads, ((s.name, s.default, s.meaning) for s in pipeline_settings()))
    return 0
