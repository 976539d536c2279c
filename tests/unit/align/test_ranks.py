"""Two gloo ranks share a run: the same tokens and, up to the order of sums, the same weights."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.align.runs import Low, recipe

from sterna.align.dump import read_dump
from sterna.align.ranks import merged
from sterna.align.rl import align_rl
from sterna.align.rlhooks import RlHook
from sterna.parallel.launch import LocalRanks, RankError

HERE = str(Path(__file__).resolve())
KINDS = {
    "grpo": {"kind": "grpo", "kl_coef": 0.1, "epochs": 2, "minibatches": 2, "micro_tokens": 60},
    "ppo": {"kind": "ppo", "kl_coef": 0.05, "aggregate": "sequence"},
}
TIMED = ("time/", "tokens_per_s/", "samples_per_s")


class Stop(RlHook):
    """Ends, kills or stops a rank after a step."""

    def __init__(self, step, kill=0):
        self._step, self._kill = step, kill

    def after_step(self, trainer, step, figures, experience):
        if step == self._step:
            trainer.outcome = "interrupted"
            if self._kill:
                trainer.outcome = None
                os.kill(trainer.parts.hybrid._group._members[0].pid, self._kill)


def run(folder, sections, stop=0, kill=0, resume=False):
    """On every rank; rank 0 writes."""
    made = recipe(Path(folder), **sections)
    hooks = [Stop(stop, kill)] if stop else []
    result = align_rl(made, rewards=[Low()], hooks=hooks, resume=resume)
    return result.steps, result.outcome


def lines(folder):
    found = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] != "alarm"]


@pytest.fixture(scope="module")
def ranks():
    root = str(Path(__file__).parents[3])
    os.environ["PYTHONPATH"] = root
    with LocalRanks() as found:
        yield found
    del os.environ["PYTHONPATH"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_make_the_run_of_one(tmp_path, ranks, kind):
    sections = {
        "algorithm": KINDS[kind], "run": {"dump": True, "steps": 3},
        "optim": {"lr": 1e-4, "ema_decay": 0.9},
    }  # fmt: skip
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        recipe(folder)  # the model's folder
        found = ranks.run(world, f"{HERE}:run", str(folder), sections)
        assert found == [(3, "done")] * world
    one, two = (lines(tmp_path / str(world)) for world in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name != "kind" and not name.startswith(TIMED):
                assert b[name] == pytest.approx(a[name], rel=2e-4, abs=2e-6), name
    names = [tmp_path / str(w) / "run/rollouts/step-00000001.safetensors" for w in (1, 2)]
    (first, _), (second, _) = map(read_dump, names)
    for a, b in zip(first.rollouts, second.rollouts, strict=True):  # before any update: bits
        assert a.completion.tolist() == b.completion.tolist()
        assert a.logprobs.tolist() == b.logprobs.tolist()
    assert torch.equal(first.advantages, second.advantages)
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-5)
    a, b = (load_file(tmp_path / str(w) / "run/model/model.safetensors") for w in (1, 2))
    assert all(torch.allclose(a[name], b[name], rtol=0, atol=2e-5) for name in a)


def test_two_ranks_resume_to_the_bit(tmp_path, ranks):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    sections = {"rollout": {"staleness": 1}, "run": {"steps": 4}}
    for folder in (whole, cut):
        folder.mkdir()
        recipe(folder)
    ranks.run(2, f"{HERE}:run", str(whole), sections)
    assert ranks.run(2, f"{HERE}:run", str(cut), sections, 2) == [(2, "interrupted")] * 2
    ranks.run(2, f"{HERE}:run", str(cut), sections, 0, 0, True)
    timed = [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines(whole)]
    again = [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines(cut)]
    assert timed == again


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_is_named_and_the_checkpoint_stands(tmp_path, kill):
    recipe(tmp_path)
    sections = {"run": {"steps": 4, "timeout_s": 600 if kill == signal.SIGKILL else 20}}
    started = time.monotonic()
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[3])
    said = "died" if kill == signal.SIGKILL else "did not answer"
    with LocalRanks() as own, pytest.raises(RankError, match=rf"WorkerError: rank 1 \(.*{said}"):
        own.run(2, f"{HERE}:run", str(tmp_path), sections, 2, int(kill))
    assert time.monotonic() - started < 300
    assert align_rl(recipe(tmp_path, **sections), rewards=[Low()], resume=True).steps == 4


def test_figures_of_ranks_are_added():
    one = {"loss": 1.0, "ratio/max": 2.0, "grad_norm": 3.0}
    found = merged([one, {"loss": 2.0, "ratio/max": 1.0, "grad_norm": 3.0}])
    assert found == {"loss": 3.0, "ratio/max": 2.0, "grad_norm": 3.0}
