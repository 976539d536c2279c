"""`sterna train`: what it prints, how it ends, what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from sterna.align.offline.config import OfflineRecipe
from sterna.cli.main import run
from sterna.train.recipe import make_recipe, to_toml

_TINY = Path(__file__).parents[1] / "train" / "tiny.py"


@pytest.fixture(scope="module")
def tiny():
    spec = importlib.util.spec_from_file_location("train_tiny", _TINY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe_file(tiny, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(tiny.recipe(tmp_path, run={"steps": 3})))
    return str(path)


def test_a_run_prints_its_changes_and_its_end_and_its_model_chats(recipe_file, tmp_path, capsys):
    more = tmp_path / "more.toml"
    more.write_text('[log]\nreport = true\nsample_prompts = ["abc"]\nsample_tokens = 4\n')
    assert run(["train", recipe_file, str(more), "--run.steps=2", "--optim.lr=0.001"]) == 0
    captured = capsys.readouterr()
    assert "optim.lr" in captured.err and "0.001" in captured.err
    assert "done after 2 steps, loss" in captured.out
    assert f"sterna chat {tmp_path / 'run/model'}" in captured.out
    assert "<h2>Samples</h2>" in (tmp_path / "run/report.html").read_text()
    saved = (tmp_path / "run/recipe.toml").read_text()
    assert "lr = 0.001" in saved
    assert run(["train", recipe_file, "--optim.lr=0.001", "--resume"]) == 0
    assert "done after 3 steps" in capsys.readouterr().out


def test_the_resolved_recipe_can_be_shown(recipe_file, capsys):
    assert run(["train", recipe_file, "--show", "--optim.lr=0.5"]) == 0
    assert "lr = 0.5\n" in capsys.readouterr().out


def test_settings_are_listed(capsys):
    assert run(["train", "--settings"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "optim.lr" in out and "peak learning rate" in out and "parallel.sp" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no recipe given"),
        (["none.toml"], "cannot read recipe none.toml"),
        (["RECIPE", "--optim.learning_rate=1"], "unknown key 'optim.learning_rate'"),
        (["RECIPE", "--run.step=1"], "did you mean 'run.steps'"),
        (["RECIPE", "--run.steps", "5"], "write an override as --section.key=value"),
    ],
)
def test_mistakes_are_one_line(recipe_file, capsys, arguments, message):
    assert run(["train", *(recipe_file if a == "RECIPE" else a for a in arguments)]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_kinds_that_compare_answers_run_here_too(tiny, tmp_path, capsys):
    tiny.recipe(tmp_path)  # the model
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "NO"} for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "kind": "dpo", "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
        "data": {"sources": [{"path": str(tmp_path / "pairs.jsonl")}], "seq_len": 128},
        "preference": {"beta": 0.5}, "run": {"steps": 2, "output": str(tmp_path / "dpo")},
        "log": {"tensorboard": False, "report": False, "peak_tflops": 0.1},
    }  # fmt: skip
    path = tmp_path / "dpo.toml"
    path.write_text(to_toml(make_recipe(values, OfflineRecipe)))
    assert run(["train", str(path)]) == 0
    captured = capsys.readouterr()
    assert "preference.beta" in captured.err and "sterna chat" in captured.out
    other = ["--kind=reward", f"--run.output={tmp_path / 'rm'}"]
    assert run(["train", str(path), *other]) == 0
    assert "sterna chat" not in capsys.readouterr().out  # a reward model answers nothing
    assert run(["train", str(path), "--verify"]) != 0
    assert "no kind = dpo" in capsys.readouterr().err
    assert run(["train", str(path), "--preference.betta=1"]) != 0
    assert "preference.beta" in capsys.readouterr().err
