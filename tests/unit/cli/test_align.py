"""`sterna align`: what it prints, how it ends, what it refuses."""

from __future__ import annotations

import json

import pytest
from tests.unit.align.runs import recipe

from sterna.cli.main import run
from sterna.train.recipe import to_toml


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe(tmp_path, run={"steps": 2, "dump": True})))
    return str(path)


def test_a_run_ends_with_a_model_that_goes_on_and_replays(recipe_file, tmp_path, capsys):
    assert run(["align", recipe_file, "--run.steps=1", "--algorithm.kl-coef=0.1"]) == 0
    captured = capsys.readouterr()
    assert "algorithm.kl_coef" in captured.err and "0.1" in captured.err
    assert "done after 1 steps, reward" in captured.out
    assert f"sterna chat {tmp_path / 'run/model'}" in captured.out
    assert run(["align", recipe_file, "--algorithm.kl_coef=0.1"]) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert run(["align", recipe_file, "--algorithm.kl_coef=0.1", "--resume", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["outcome"] == "done" and result["steps"] == 2
    dump = str(tmp_path / "run/rollouts/step-00000002.safetensors")
    assert run(["align", recipe_file, "--algorithm.kl_coef=0.1", "--replay", dump]) == 0
    assert capsys.readouterr().out.endswith("identical\n")
    assert run(["align", recipe_file, "--algorithm.kl_coef=0.1", "--replay", dump, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_identical"]


def test_the_resolved_recipe_can_be_shown(recipe_file, capsys):
    assert run(["align", recipe_file, "--show", "--optim.lr=0.5"]) == 0
    assert "lr = 0.5\n" in capsys.readouterr().out


def test_settings_are_listed(capsys):
    assert run(["align", "--settings"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "algorithm.eps_low" in out and "critic.optim.lr" in out and "rewards[].kind" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no recipe given"),
        (["none.toml"], "cannot read recipe none.toml"),
        (["RECIPE", "--algorithm.klcoef=1"], "did you mean 'algorithm.kl_coef'"),
        (["RECIPE", "--algorithm.kind=pop"], "algorithm.kind: Input should be"),
        (["RECIPE", "--rollout.group_size=1"], "grpo compares a prompt's completions"),
        (["RECIPE", "--prompts.path=x.jsonl"], "give one of prompts.path, prompts.sources"),
    ],
)
def test_mistakes_are_one_line(recipe_file, capsys, arguments, message):
    assert run(["align", *(recipe_file if a == "RECIPE" else a for a in arguments)]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
