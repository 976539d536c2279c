"""A run of reinforcement learning as a process: killed at any point, it ends in the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.align.runs import recipe
from torch.distributed.checkpoint import FileSystemReader

from sterna.train.checkpoint import load_state

STEPS = 12
RUN = """
import sys
from sterna.align.config import RlRecipe
from sterna.align.rl import align_rl
from tests.unit.align.runs import Low
made = RlRecipe.model_validate_json(open(sys.argv[1]).read())
align_rl(made, rewards=[Low()], resume=len(sys.argv) > 2)
"""
KINDS = {
    "ppo": {"kind": "ppo", "kl_coef": 0.05, "epochs": 2, "kl_target": 1.0},
    "grpo": {"kind": "grpo", "kl_coef": 0.1, "epochs": 2, "minibatches": 2},
}


def start(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder / "recipe.json"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def steps(folder):
    path = folder / "run" / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def wait_for_step(process, folder, step):
    while process.poll() is None and len(steps(folder)) < step:
        time.sleep(0.005)


def figures(folder):
    timed = ("time/", "tokens_per_s/", "samples_per_s")
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(timed)}
        for line in steps(folder)
    ]


def state_of(folder):
    """Moments, critic, average and random state of a checkpoint."""
    found = FileSystemReader(folder / "state").read_metadata().state_dict_metadata
    tensors = {key: torch.zeros(m.size, dtype=m.properties.dtype) for key, m in found.items()}
    load_state(folder, tensors)
    return tensors


@pytest.mark.parametrize("kind", ["ppo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_killed_anywhere_a_run_ends_in_the_same_bits(tmp_path, kind):
    """Rewards, losses, tokens, weights and the average of the weights."""
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
        made = recipe(
            folder, algorithm=KINDS[kind], run={"steps": STEPS, "samples": 16},
            optim={"lr": 1e-3, "ema_decay": 0.9},
            checkpoint={"every": 2, "keep_last": 2, "is_async": True},
        )  # fmt: skip
        (folder / "recipe.json").write_text(made.model_dump_json())
    whole, killed = folders
    process = start(whole)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    chance = random.Random(os.environ.get("PYTEST_SEED", time.time()))
    deaths = 0
    for stretch in range(2):
        process = start(killed, "--resume")
        wait_for_step(process, killed, 3 + 4 * stretch + chance.randrange(3))
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        deaths += process.wait() == -signal.SIGKILL
        process.communicate()
    assert deaths == 2
    process = start(killed, "--resume")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert figures(killed) == figures(whole)
    texts = [(folder / "run" / "samples.jsonl").read_text() for folder in folders]
    assert texts[0] == texts[1]
    last = f"run/checkpoints/step-{STEPS:08d}"
    for name in ("run/model", last):
        first, second = (load_file(f / name / "model.safetensors") for f in folders)
        assert all(torch.equal(first[key], second[key]) for key in first)
    state = [state_of(folder / last) for folder in folders]
    assert any(key.startswith("ema/") for key in state[0])
    assert all(torch.equal(state[0][key], state[1][key]) for key in state[0])
