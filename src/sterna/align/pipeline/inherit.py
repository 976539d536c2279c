"""What the tables of a pipeline take from the common ones, and one step from the step before.

As in DeepSpeed-Chat (arXiv 2308.01320, section 3): step 3 starts from step 1's model and is held
to it; step 2's model is the reward, and the critic starts from it. Examples are parted by
`data.split`, so none is in two steps. What a step's own table says stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sterna.data.config import DataConfig
from sterna.train.config import ModelSection

FOLDERS = {"sft": "1-sft", "reward": "2-reward", "rl": "3-rl"}
Values = dict[str, Any]
_DEFAULT_OUTPUT = "runs/align"
_TABLES = ("run", "model", "data", "prompts", "algorithm", "critic", "ptx", "memory")
_ORIGINS = ("path", "config", "tokenizer")
# Of [data], for prompts; the order and the cuts follow from the same seed.
_PROMPTS = ("sources", "seed", "held_out", "split", "template_kwargs", "on_bad_row")


def model_of_step(output: Path | str, step: str) -> str:
    """The model that a step leaves."""
    return str(Path(output) / FOLDERS[step] / "model")


def inherited(values: Any) -> Any:
    """The values of an AlignRecipe with every step's table complete.

    Where a common table is wrong the steps are left out, so that it is reported once. ValueError
    for what a step may not set.
    """
    if not isinstance(values, Mapping):
        return values
    found: Values = {key: _plain(value) for key, value in values.items()}
    if not _is_sound(found):
        return {key: value for key, value in found.items() if key not in FOLDERS}
    tables = [name for name in FOLDERS if isinstance(found.get(name), dict)]
    for part, name in enumerate(FOLDERS):
        if name in tables:
            _complete(found, name, part, tables)
    return found


def _plain(value: Any) -> Any:
    """Nested values that may be changed."""
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else deepcopy(value)


def _is_sound(values: Values) -> bool:
    try:
        if values.get("data") is not None:
            DataConfig.model_validate(values["data"])
        ModelSection.model_validate(values.get("model", {}))
    except ValidationError:
        return False
    return isinstance(values.get("run", {}), dict)


def _complete(values: Values, name: str, part: int, tables: list[str]) -> None:
    table: Values = values[name]
    if any(not isinstance(table.get(key, {}), dict) for key in _TABLES):
        return  # the recipe's own check names it
    run = values.get("run", {})
    output = str(Path(run.get("output", _DEFAULT_OUTPUT)) / FOLDERS[name])
    own = table.get("run", {})
    if str(own.get("output", output)) != output:
        raise ValueError(f"{name}.run.output follows from run.output ({output}); leave it out")
    shared = {key: run[key] for key in ("seed", "threads") if key in run}
    table["run"] = {**shared, **own, "output": output}
    start = _start(values, name, tables)
    table["model"] = _model(values.get("model", {}), table.get("model", {}), start)
    if name == "rl":
        _complete_rl(values, table, part, tables)
        return
    data = _data(name, values.get("data"), table.get("data"), part)
    if data is not None:
        table["data"] = data
    if name == "reward":
        table.setdefault("kind", "reward")
        table.setdefault("parallel", {"shard": "none"})  # of a value model no weight is cut


def _start(values: Values, name: str, tables: list[str]) -> str | None:
    """The model of step 1 where the step goes on from that."""
    is_wanted = name == "rl" or (name == "reward" and values.get("reward_from", "sft") == "sft")
    output = values.get("run", {}).get("output", _DEFAULT_OUTPUT)
    return model_of_step(output, "sft") if is_wanted and "sft" in tables else None


def _model(common: Values, own: Values, start: str | None) -> Values:
    """The step's [model]: where its weights come from is one's own, step 1's, or the common."""
    if any(own.get(key) for key in ("path", "config")):
        common = {key: value for key, value in common.items() if key not in _ORIGINS}
    elif start is not None:
        common = {key: value for key, value in common.items() if key not in _ORIGINS}
        common["path"] = start
    return {**common, **{key: value for key, value in own.items() if value not in ("", None)}}


def _data(name: str, common: Values | None, own: Values | None, part: int) -> Values | None:
    """The step's [data]; of the common files its part."""
    if common is None or (own is not None and "sources" in own):
        return own
    return _with_part(name, {**common, **(own or {})}, part)


def _with_part(name: str, data: Values, part: int) -> Values:
    if not data.get("split"):
        return data
    if len(data["split"]) != len(FOLDERS):
        raise ValueError(
            f"data.split has {len(data['split'])} shares; a pipeline has {len(FOLDERS)}, one a "
            "step, such as [2, 4, 4]"
        )
    if data.get("split_part", part) not in (0, part):
        raise ValueError(f"the part of {name} is {part} (from 0); leave split_part out")
    return {**data, "split_part": part}


def _complete_rl(values: Values, table: Values, part: int, tables: list[str]) -> None:
    """Memory, prompts, rewards and critic of step 3."""
    if isinstance(values.get("memory", {}), dict):
        table["memory"] = {**values.get("memory", {}), **table.get("memory", {})}
    data, prompts = values.get("data"), table.get("prompts", {})
    if data is not None and not any(prompts.get(key) for key in ("path", "sources", "task")):
        common = {key: data[key] for key in _PROMPTS if key in data}
        table["prompts"] = _with_part("rl", {**common, **prompts}, part)
    ptx = table.get("ptx", {})
    if ptx.get("coef") and ptx.get("data") is None and "data" in (values.get("sft") or {}):
        ptx["data"] = values["sft"]["data"]  # step 1's, which is complete by now
    algorithm = table.setdefault("algorithm", {})
    algorithm.setdefault("kind", "ppo")
    if "reward" not in tables:
        return
    model = model_of_step(values.get("run", {}).get("output", _DEFAULT_OUTPUT), "reward")
    rewards = table.get("rewards") or [{"kind": "model"}]
    table["rewards"] = [{**one, "path": model} if _is_unnamed(one) else one for one in rewards]
    if algorithm["kind"] == "ppo":
        critic = table.setdefault("critic", {})
        critic["path"] = critic.get("path") or model


def _is_unnamed(reward: Any) -> bool:
    """Whether a reward is a model of which nobody says which."""
    return isinstance(reward, dict) and reward.get("kind") == "model" and not reward.get("path")
