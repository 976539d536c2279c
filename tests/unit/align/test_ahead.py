"""One step off: whose weights drew what, and the queue in a checkpoint."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tests.unit.align.runs import Low, recipe

from sterna.align.ahead import pack, unpack
from sterna.align.rl import align_rl
from sterna.align.rlhooks import RlHook
from sterna.align.rollout import Rollout
from sterna.core.errors import WorkerError

STALE = {"staleness": 1}
TIMED = ("time/", "tokens_per_s/", "samples_per_s")


def lines(folder):
    text = (folder / "run" / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [line for line in found if line["kind"] != "alarm"]


def untimed(line):
    return {name: value for name, value in line.items() if not name.startswith(TIMED)}


class Watch(RlHook):
    """Keeps what each step was trained on; stops after a step, as a signal would."""

    def __init__(self, stop=0):
        self.steps = []
        self._stop = stop

    def after_step(self, trainer, step, figures, experience):
        self.steps.append(experience)
        if step == self._stop:
            trainer.outcome = "interrupted"


def versions(watch):
    return [{r.policy_version for r in experience.rollouts} for experience in watch.steps]


def test_each_step_trains_on_what_the_weights_before_the_last_update_drew(tmp_path):
    watch = Watch()
    align_rl(recipe(tmp_path, rollout=STALE, run={"steps": 4}), rewards=[Low()], hooks=[watch])
    assert versions(watch) == [{0}, {0}, {1}, {2}]
    found = lines(tmp_path)
    assert [line["sampling/staleness"] for line in found] == [0, 1, 1, 1]
    gaps = [line["sampling/sampling_logp_difference/max"] for line in found]
    assert gaps[0] == 0.0
    assert all(gap > 0 for gap in gaps[1:])
    # The trainer's log-probs are those of its present weights: the first ratio is 1 all the same.
    assert all(line["ratio/max"] == line["ratio/min"] == 1.0 for line in found)


def test_the_first_two_steps_draw_from_the_same_weights(tmp_path):
    on, off = tmp_path / "on", tmp_path / "off"
    kept = {}
    for folder, staleness in ((on, 1), (off, 0)):
        folder.mkdir()
        watch = kept[folder] = Watch()
        made = recipe(folder, rollout={"staleness": staleness}, run={"steps": 2})
        align_rl(made, rewards=[Low()], hooks=[watch])
    a, b = kept[on].steps, kept[off].steps
    same = [
        [
            np.array_equal(x.completion, y.completion)
            for x, y in zip(one.rollouts, other.rollouts, strict=True)
        ]
        for one, other in zip(a, b, strict=True)
    ]
    assert all(same[0])  # step 1 is on-policy either way
    assert untimed(lines(on)[0])["loss"] == untimed(lines(off)[0])["loss"]
    assert not all(same[1])


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_run_with_a_full_queue_resumes_to_the_bit(tmp_path, kind):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    extra = {"rollout": STALE, "algorithm": {"kind": kind, "kl_coef": 0.05}, "run": {"steps": 4}}
    for folder in (whole, cut):
        folder.mkdir()
    align_rl(recipe(whole, **extra), rewards=[Low()])
    align_rl(recipe(cut, **extra), rewards=[Low()], hooks=[Watch(stop=2)])
    meta = json.loads((cut / "run/checkpoints/step-00000002/trainer.json").read_text())
    assert meta["ahead"]["position"] == 8  # of 12 prompts taken
    watch = Watch()
    align_rl(recipe(cut, **extra), rewards=[Low()], hooks=[watch], resume=True)
    assert versions(watch) == [{1}, {2}]
    assert [untimed(line) for line in lines(whole)] == [untimed(line) for line in lines(cut)]
    first, second = (load_file(f / "run" / "model" / "model.safetensors") for f in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rollouts_are_packed_to_the_bit():
    generator = np.random.default_rng(0)
    rollouts = [
        Rollout(
            prompt_idx=i, sample_idx=2, prompt=generator.integers(0, 99, 5).astype(np.int32),
            completion=generator.integers(0, 99, size).astype(np.int32),
            mask=generator.random(size) < 0.5, logprobs=-generator.random(size).astype(np.float32),
            policy_version=7, is_truncated=i == 1, tool_calls=i,
        )
        for i, size in enumerate((3, 0, 1))
    ]  # fmt: skip
    for one, other in zip(rollouts, unpack(pack(rollouts)), strict=True):
        for name in Rollout.__slots__:
            a, b = getattr(one, name), getattr(other, name)
            assert type(a) is type(b)
            assert np.array_equal(a, b)
            assert getattr(a, "dtype", None) == getattr(b, "dtype", None)


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(ValidationError, match="leave one of them out"):
        recipe(tmp_path, rollout=STALE, algorithm={"kind": "grpo", "dynamic_sampling": 1})


@pytest.mark.parametrize(
    ("staleness", "workers", "transport"),
    [(0, 2, "shared"), (1, 2, "shared"), (0, 2, "broadcast"), (1, 2, "broadcast")],
)
def test_processes_draw_what_one_would(tmp_path, staleness, workers, transport):
    """Beside the trainer's or in it, one step off or not: the same run to the bit."""
    kept = []
    for number in (0, workers):
        folder = tmp_path / str(number)
        folder.mkdir()
        rollout = {"staleness": staleness, "workers": number, "transport": transport}
        settings = {"every": 2, "prompts": 2}
        align_rl(recipe(folder, rollout=rollout, eval=settings), rewards=[Low()])
        kept.append([untimed(line) for line in lines(folder)])
    assert kept[0] == kept[1]


class Kill(RlHook):
    """As the system would when memory ends: a worker goes at the start of a step."""

    def after_step(self, trainer, step, figures, experience):
        if step == 2:
            os.kill(trainer.parts.hybrid._group._members[1].pid, signal.SIGKILL)


@pytest.mark.parametrize("transport", ["shared", "broadcast"])
def test_a_killed_worker_ends_the_run_and_loses_nothing(tmp_path, transport):
    """The rest of the run, drawn by this process, goes on from the full queue to the bit."""
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for folder in (cut, whole):
        folder.mkdir()
    rollout = {"staleness": 1, "workers": 2, "transport": transport}
    made = recipe(cut, rollout=rollout, run={"steps": 4})
    with pytest.raises(WorkerError, match=r"rank 1 \(.*\) died of signal 9 in `"):
        align_rl(made, rewards=[Low()], hooks=[Kill()])
    names = sorted(path.name for path in (cut / "run" / "checkpoints").iterdir())
    assert names[-1] in ("step-00000001", "step-00000002")
    made = recipe(cut, rollout=STALE, run={"steps": 4})
    assert align_rl(made, rewards=[Low()], resume=True).steps == 4
    align_rl(recipe(whole, rollout=STALE, run={"steps": 4}), rewards=[Low()])
    assert [untimed(line) for line in lines(whole)] == [untimed(line) for line in lines(cut)]
