"""Recipes of three steps: what a step takes from the others, what is refused, what is kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests import pipeline_kit as kit

from sterna.align.config import RlRecipe
from sterna.align.offline.config import OfflineRecipe
from sterna.align.pipeline.compare import win_rate
from sterna.align.pipeline.config import AlignRecipe
from sterna.align.pipeline.run import align_pipeline
from sterna.core.errors import ConfigError
from sterna.train.config import Recipe
from sterna.train.recipe import make_recipe, merge_into, read_layers, to_toml

RECIPES = Path(__file__).parents[3] / "recipes"

SHORT = {
    "compare": {"prompts": 4},
    "sft": {"run": {"steps": 2}, "checkpoint": {"every": 0}},
    "reward": {"run": {"steps": 2}, "checkpoint": {"every": 0}},
    "rl": {
        "rollout": {"prompts_per_step": 2, "group_size": 2},
        "run": {"steps": 2},
        "checkpoint": {"every": 0},
    },
}


def recipe(folder, **changed):
    values = kit.values(folder)
    merge_into(values, SHORT)
    merge_into(values, changed)
    return make_recipe(values, AlignRecipe)


def test_a_step_takes_what_the_common_tables_and_the_steps_before_have(tmp_path):
    made = recipe(tmp_path, run={"seed": 7}, reward={"run": {"seed": 8}})
    run = tmp_path / "run"
    assert made.sft.model.config == tmp_path / "config.json"
    assert [made.sft.run.seed, made.reward.run.seed, made.rl.run.seed] == [7, 8, 7]
    assert made.reward.model.path == made.rl.model.path == str(run / "1-sft/model")
    assert made.rl.critic.path == made.rl.rewards[0].path == str(run / "2-reward/model")
    assert made.rl.algorithm.kind == "ppo" and made.reward.data.rows == "pairs"
    parts = [made.sft.data.split_part, made.reward.data.split_part, made.rl.prompts.split_part]
    assert parts == [0, 1, 2]
    assert made.rl.prompts.sources == made.sft.data.sources
    assert made.rl.prompts.held_out == made.sft.data.held_out
    assert made.needs("rl") == ["sft", "reward"] and made.needs("reward") == ["sft"]
    again = make_recipe(made.model_dump(), AlignRecipe)
    assert again == made
    assert to_toml(again) == to_toml(made)


def test_a_step_keeps_what_is_its_own(tmp_path):
    own = {"path": "other", "dtype": "bfloat16"}
    made = recipe(
        tmp_path,
        reward={"model": own},
        rl={"prompts": {"task": "arithmetic"}, "algorithm": {"kind": "grpo"}},
    )
    assert made.reward.model.path == "other" and made.reward.model.dtype == "bfloat16"
    assert made.reward.model.tokenizer == ""
    assert made.needs("reward") == []
    assert not made.rl.prompts.sources and made.rl.critic.path == ""


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": ["sft", "dpo"]}, r"steps\.1: Input should be"),
        ({"steps": ["reward"], "reward": None}, "steps names reward, which has no table"),
        ({"sft": {"optim": {"rate": 1}}}, r"unknown key 'sft\.optim\.rate'"),
        ({"rl": {"algorithm": {"kl_cof": 1}}}, r"did you mean 'rl\.algorithm\.kl_coef'"),
        ({"data": {"seq_length": 3}}, r"^unknown key 'data\.seq_length'; did you mean[^;]*$"),
        ({"data": {"split": [1, 1]}}, "a pipeline has 3, one a step"),
        ({"reward": {"data": {"split_part": 2}}}, "the part of reward is 1"),
        ({"sft": {"model": 3}}, r"sft\.model: Input should be"),
        ({"rl": {"rewards": [3]}}, r"rl\.rewards\.0: Input should be"),
        ({"sft": {"run": {"output": "x"}}}, r"sft\.run\.output follows from run\.output"),
        ({"reward": {"kind": "dpo"}}, "its kind is 'dpo'"),
    ],
)
def test_mistakes_are_named(tmp_path, changed, message):
    with pytest.raises(ConfigError, match=message):
        recipe(tmp_path, **changed)


def test_steps_may_run_one_by_one_and_finished_ones_are_kept(tmp_path, own_home):
    kit.write_task(tmp_path, pairs=400)
    with pytest.raises(ConfigError, match=r'1-sft, which is not finished.*steps = \["sft", "rl'):
        align_pipeline(recipe(tmp_path, steps=["rl"]))
    first = align_pipeline(recipe(tmp_path, steps=["sft"]))
    assert first.step == "sft" and first.table.comparison is None
    with pytest.raises(ConfigError, match="has begun already; go on with --resume"):
        align_pipeline(recipe(tmp_path))
    made = (tmp_path / "run/1-sft/model/model.safetensors").stat().st_mtime_ns
    whole = align_pipeline(recipe(tmp_path), resume=True)
    assert whole.model == tmp_path / "run/3-rl/model"
    assert (tmp_path / "run/1-sft/model/model.safetensors").stat().st_mtime_ns == made
    with pytest.raises(ConfigError, match=r"is finished.*sft\.optim\.lr \(0\.003, now 0\.1\)"):
        align_pipeline(recipe(tmp_path, sft={"optim": {"lr": 0.1}}), resume=True)
    with pytest.raises(ConfigError, match=r"is finished.*rl\.run\.steps \(2, now 3\)"):
        align_pipeline(recipe(tmp_path, rl={"run": {"steps": 3}}), resume=True)
    shutil.move(tmp_path / "run", tmp_path / "moved")  # a folder may move
    moved = align_pipeline(recipe(tmp_path, run={"output": str(tmp_path / "moved")}), resume=True)
    assert moved.table == whole.table
    shutil.rmtree(tmp_path / "moved/1-sft")
    other = {"run": {"output": str(tmp_path / "moved")}, "sft": {"run": {"seed": 5}}}
    with pytest.raises(ConfigError, match=r"2-reward was made from another .*1-sft"):
        align_pipeline(recipe(tmp_path, **other), resume=True)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_published_recipes_are_valid(path):
    values = read_layers([path])
    if "align" in path.stem:
        made = make_recipe(values, AlignRecipe)
        assert made.chosen() == ["sft", "reward", "rl"] and made.needs("rl") == ["sft", "reward"]
    elif "kind" in values:
        assert make_recipe(values, Recipe if values["kind"] == "sft" else OfflineRecipe)
    else:
        assert make_recipe(values, RlRecipe)


def test_win_rate_counts_ties_half():
    before, after = torch.tensor([0.0, 1, 2, 3]), torch.tensor([1.0, 1, 0, 4])
    assert win_rate(before, after) == 2.5 / 4
