"""Recipes: layers, overrides, what is said of a mistake, and the way back to TOML."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sterna.core.errors import ConfigError
from sterna.train.recipe import changes, make_recipe, parse_override, read_recipe, to_toml
from sterna.train.settings import all_settings

BASE = '[[data.sources]]\npath = "chats.jsonl"\n[optim]\nlr = 1e-4\nbeta2 = 0.98\n'


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_files_are_layered_left_to_right_and_overrides_win(write):
    files = [write("a.toml", BASE), write("b.toml", "[optim]\nlr = 2e-4\n[run]\nsteps = 7\n")]
    recipe = read_recipe(files, ["--optim.eps=1e-6", "--kind=pretrain", "--run.rows-per-step=3"])
    assert (recipe.optim.lr, recipe.optim.beta2, recipe.optim.eps) == (2e-4, 0.98, 1e-6)
    assert (recipe.kind, recipe.run.steps, recipe.run.rows_per_step) == ("pretrain", 7, 3)
    assert recipe.data.sources[0].path == "chats.jsonl"


def test_the_resolved_recipe_reads_back_as_itself(write):
    recipe = read_recipe(
        [write("a.toml", BASE)],
        ['--data.sources=[{path = "q\\"x.jsonl", fields = {prompt = "a.b"}, weight = 2}]',
         "--log.sample_prompts=['one', 'two']", "--data.template_kwargs={think = false}"],
    )  # fmt: skip
    again = read_recipe([write("again.toml", to_toml(recipe))])
    assert again == recipe


def test_changes_name_what_differs(write):
    recipe = read_recipe([write("a.toml", BASE)])
    found = changes(recipe)
    assert found["optim.lr"] == (2e-5, 1e-4)
    assert set(found) == {"optim.lr", "optim.beta2", "data.sources"}
    assert found["data.sources"][1] == [{"path": "chats.jsonl"}]
    other = make_recipe({"data": {"sources": [{"path": "chats.jsonl"}]}})
    assert set(changes(recipe, other)) == {"optim.lr", "optim.beta2"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlearning_rate = 1", "unknown key 'optim.learning_rate'"),
        ("[optim]\nbeta_2 = 1", "did you mean 'optim.beta2'"),
        ("[optimm]\nlr = 1", "did you mean 'optim'"),
        ("[optim]\nlr = -1", r"optim.lr: Input should be greater than 0 \(given -1\)"),
        ("[optim]\nstates = '4bit'", "optim.states: Input should be 'float32', 'bfloat16' or"),
        ("[[data.sources]]\npth = 'x'", "did you mean 'data.sources.0.path'"),
        ("[model]\npath = 'a'\nconfig = 'b'", "model: model.path and model.config are both set"),
        ("lr = ", "is no TOML"),
    ],
)
def test_mistakes_are_answered(write, text, message):
    with pytest.raises(ConfigError, match=message):
        read_recipe([write("a.toml", BASE), write("b.toml", text)])


@pytest.mark.parametrize("flag", ["--optim.lr", "optim.lr=1", "--=1"])
def test_overrides_that_are_none(flag):
    with pytest.raises(ConfigError, match=r"--section\.key=value"):
        parse_override(flag)


def test_every_setting_is_described():
    settings = list(all_settings())
    assert [s.name for s in settings if not s.meaning] == []
    names = {s.name for s in settings}
    assert {"kind", "optim.lr", "data.sources[].path", "parallel.sp", "eval.data"} <= names


def test_recipes_load_no_torch():
    code = (
        "import sys, sterna.train.recipe, sterna.train.settings; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
