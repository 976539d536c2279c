"""`sterna train` under torchrun: two processes over gloo, one of them killed, too many of them.

The command is the one of docs/training.md.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

_TINY = Path(__file__).parents[1] / "unit" / "train" / "tiny.py"
_DOCS = Path(__file__).parents[2] / "docs" / "training.md"
COMMAND = "torchrun --standalone --nproc-per-node {} -m sterna.cli train"
STEPS = 12


@pytest.fixture
def recipe_file(tmp_path):
    spec = importlib.util.spec_from_file_location("train_tiny", _TINY)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    from sterna.train.recipe import to_toml

    recipe = tiny.recipe(
        tmp_path,
        data={"held_out": 0.1},
        eval={"max_rows": 2},
        run={"steps": STEPS, "threads": 0},
        checkpoint={"every": 3},
    )
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe))
    return path


def start(recipe_file, output, *arguments, ranks=2):
    words = COMMAND.format(ranks).split()
    launcher = [sys.executable, "-m", "torch.distributed.run"]  # what the script torchrun runs
    return subprocess.Popen(
        [*launcher, *words[1:], str(recipe_file), f"--run.output={output}", *arguments],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


def num_steps(output):
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(json.loads(line)["kind"] == "step" for line in lines)


def test_the_documentation_has_the_command():
    assert COMMAND.format(4) + " recipe.toml" in _DOCS.read_text()


def test_two_ranks_one_killed_and_resumed_end_in_the_same_bits(recipe_file, tmp_path):
    """Rank 1 dies by kill -9 between two checkpoints: torchrun ends the other, --resume goes on."""
    code, out, err = finish(start(recipe_file, tmp_path / "whole"))
    assert code == 0, err
    assert out.count("done after 12 steps") == 1  # the first rank alone talks
    assert err.count("setting") == 1, err

    killed = tmp_path / "killed"
    launcher = start(recipe_file, killed)
    victim = None
    while launcher.poll() is None and (victim is None or num_steps(killed) < 5):
        for child in psutil.Process(launcher.pid).children(recursive=True):
            victim = child if child.is_running() and _rank(child) == "1" else victim
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    code, out, err = finish(launcher)
    assert code != 0 and "done after" not in out, out
    assert 4 < num_steps(killed) < STEPS

    code, out, err = finish(start(recipe_file, killed, "--resume"))
    assert code == 0 and "done after 12 steps" in out, err
    first = load_file(tmp_path / "whole/model/model.safetensors")
    second = load_file(killed / "model/model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)

    more = (f"--run.steps={STEPS + 3}", "--resume")
    code, out, err = finish(start(recipe_file, killed, *more, ranks=1))
    assert code != 0 and "was written by dp 2 x sp 1 ranks, this run has dp 1 x sp 1" in err, err


def _rank(process):
    try:
        return process.environ().get("RANK")
    except psutil.Error:
        return None


def test_a_world_that_does_not_match_says_so(recipe_file, tmp_path):
    code, _, err = finish(start(recipe_file, tmp_path / "run", "--parallel.sp=3"))
    assert code != 0
    # torchrun ends the slower rank, maybe before it has spoken, and shows a traceback of its own
    assert "error: 2 processes started, but dp 1 x sp 3 x tp 1 needs 3; start 3" in err
    assert "/sterna/" not in err.partition("ChildFailedError")[0], err
    assert not (tmp_path / "run").exists()
