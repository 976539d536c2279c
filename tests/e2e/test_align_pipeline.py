"""`sterna align`: three steps in one command, from random weights to an aligned model that serves.

The whole run is a model of 1.3 M weights in about 25 CPU seconds; the kills use a smaller one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tests import pipeline_kit as kit

from sterna.align.pipeline.config import AlignRecipe
from sterna.cli.main import run
from sterna.train.recipe import merge_into, to_toml

MODEL = "model.safetensors"


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("STERNA_HOME", str(tmp_path / "home"))


def write_recipe(folder, **changed):
    made = kit.values(folder)
    merge_into(made, changed)
    path = folder / "recipe.toml"
    path.write_text(to_toml(AlignRecipe.model_validate(made)))
    return str(path)


@pytest.mark.timeout(900)  # 25 CPU seconds, on a machine that may be shared by many
def test_three_steps_in_one_command(tmp_path, capsys):
    kit.write_task(tmp_path, hidden=160, layers=4)
    assert run(["align", write_recipe(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    table, both = told["table"], told["table"]["comparison"]
    assert table["reward_accuracy"] > 0.8  # one pair in twenty is the wrong way about
    assert both["after"]["reward"] > both["before"]["reward"] + 0.3
    assert both["after"]["parts"]["gold"] > both["before"]["parts"]["gold"] + 0.2
    assert both["win_metric"] == "gold" and both["win_rate"] > 0.6
    assert 0 < both["kl"] < 8
    assert both["after"]["truncated"] < 0.1  # the end is trained though padding is the same token
    assert run(["align", write_recipe(tmp_path), "--resume"]) == 0
    out = capsys.readouterr().out
    assert "step 3: gold" in out and f"sterna chat {tmp_path}/run/3-rl/model" in out
    page = (tmp_path / "run/report.html").read_text()
    assert "step 2: accuracy on held-out pairs" in page and "<svg" in page
    serve = ["complete", "--model", told["model"], "--temperature", "0", "--max-tokens", "16"]
    asked = "<|user|>tell me about the film of light 7<|end|>\n<|assistant|>"
    assert run([*serve, asked]) == 0
    assert kit.worth(capsys.readouterr().out) > 0


# A whole run of a few steps, and when it is killed: once this file is there.
SHORT = {
    "compare": {"prompts": 8},
    "sft": {"run": {"steps": 5}, "checkpoint": {"every": 1}},
    "reward": {"run": {"steps": 4}, "checkpoint": {"every": 1}},
    "rl": {
        "rollout": {"prompts_per_step": 4, "group_size": 2},
        "run": {"steps": 4},
        "checkpoint": {"every": 1},
    },
}
KILLS = (
    "1-sft/checkpoints/step-00000002/COMPLETE",
    "1-sft/model/config.json",
    "2-reward/checkpoints/step-00000003/COMPLETE",
    "3-rl/checkpoints/step-00000002/COMPLETE",
)


def start(path, *more):
    command = [sys.executable, "-m", "sterna.cli", "align", path, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.timeout(900)
def test_killed_anywhere_it_ends_with_the_same_bits(tmp_path):
    kit.write_task(tmp_path, pairs=600)
    whole = {**SHORT, "run": {"output": str(tmp_path / "whole")}}
    assert run(["align", write_recipe(tmp_path, **whole)]) == 0
    path = write_recipe(tmp_path, **SHORT)
    for name in KILLS:
        process = start(path, "--resume")
        while not (tmp_path / "run" / name).exists():
            time.sleep(0.02)
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run(["align", path, "--resume"]) == 0
    for step in ("1-sft", "2-reward", "3-rl"):
        one, other = (tmp_path / name / step / "model" / MODEL for name in ("whole", "run"))
        assert one.read_bytes() == other.read_bytes(), step
    one, other = (tmp_path / name / "outcome.json" for name in ("whole", "run"))
    assert one.read_text() == other.read_text()
