"""`sterna train` as a process: killed at any point, stopped by signals, on a full disk."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

_TINY = Path(__file__).parents[1] / "unit" / "train" / "tiny.py"
STEPS = 40


@pytest.fixture(scope="module")
def tiny():
    spec = importlib.util.spec_from_file_location("train_tiny", _TINY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe_file(tiny, tmp_path):
    """A recipe whose state is rich: bfloat16 with masters, EMA, noise, held-out rows."""
    from sterna.train.recipe import to_toml

    recipe = tiny.recipe(
        tmp_path,
        model={"dtype": "bfloat16", "neftune_alpha": 5.0},
        optim={"ema_decay": 0.9, "weight_decay": 0.1},
        data={"held_out": 0.1, "prefetch": 1},
        eval={"every": 10, "max_rows": 2},
        run={"steps": STEPS, "micro_rows": 2},
        checkpoint={"every": 3, "keep_last": 2},
    )
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe))
    return path


def start(recipe_file, output, *arguments, limit=None):
    def cap():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-m", "sterna.cli", "train", str(recipe_file),
         f"--run.output={output}", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=cap,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def lines(output):
    path = output / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def steps_of(output):
    found = [json.loads(line) for line in lines(output)]
    keep = ("step", "loss", "grad_norm", "lr", "tokens", "targets")
    return [[x[k] for k in keep] for x in found if x["kind"] == "step"]


def wait_for_step(process, output, step):
    while process.poll() is None:
        if sum(line.startswith('{"kind": "step"') for line in lines(output)) >= step:
            return
        time.sleep(0.002)


def test_killed_anywhere_a_run_ends_in_the_same_bits(recipe_file, tmp_path):
    """kill -9 at five random moments, each in another stretch of the run; among them moments when a
    checkpoint is being written, which is most of the time here."""
    whole = tmp_path / "whole"
    code, out, err = finish(start(recipe_file, whole))
    assert code == 0, err
    assert "done after 40 steps" in out
    chance = random.Random(os.environ.get("PYTEST_SEED", time.time()))
    killed, deaths = tmp_path / "killed", 0
    for stretch in range(5):
        process = start(recipe_file, killed, "--resume")
        wait_for_step(process, killed, 2 + 7 * stretch + chance.randrange(6))
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        deaths += process.wait() == -signal.SIGKILL
        process.communicate()
    assert deaths >= 4  # the last may have come too late
    code, out, err = finish(start(recipe_file, killed, "--resume"))
    assert code == 0, err
    assert steps_of(killed) == steps_of(whole)
    assert [row[0] for row in steps_of(whole)] == list(range(1, STEPS + 1))
    for name in ("model", f"checkpoints/step-{STEPS:08d}"):
        first = load_file(whole / name / "model.safetensors")
        second = load_file(killed / name / "model.safetensors")
        assert set(first) == set(second)
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert not list((killed / "checkpoints").glob(".*"))


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals_leave_a_checkpoint_and_a_line(recipe_file, tmp_path, name, code):
    output = tmp_path / "run"
    process = start(recipe_file, output)
    wait_for_step(process, output, 4)
    process.send_signal(getattr(signal, name))
    found, out, err = finish(process)
    assert found == code, err
    assert "go on with the same command and --resume" in out
    assert "Traceback" not in err
    code, out, err = finish(start(recipe_file, output, "--resume"))
    assert code == 0 and "done after 40 steps" in out, err


def test_a_disk_that_fills_up(recipe_file, tmp_path):
    """Files may grow to 600 kB: the optimizer's state (about 900 kB) does not fit."""
    output = tmp_path / "run"
    code, out, err = finish(start(recipe_file, output, "--run.steps=5", "--checkpoint.every=2"))
    assert code == 0, err
    more = ("--run.steps=9", "--checkpoint.every=2", "--resume")
    code, out, err = finish(start(recipe_file, output, *more, limit=600_000))
    assert code == 10, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("sterna: error: cannot write a checkpoint"), last
    assert "File too large" in last and "the last good one is" in last, last
    code, out, err = finish(start(recipe_file, output, *more))
    assert code == 0 and "done after 9 steps" in out, err
