"""Whole runs of the loop at tiny size."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.align.runs import Low, recipe

from sterna.align.dump import read_dump
from sterna.align.replay import replay
from sterna.align.rl import align_rl
from sterna.align.rlhooks import RlHook
from sterna.align.tasks.arithmetic import Arithmetic
from sterna.core.errors import ConfigError, NonFiniteError, RewardError, TrainError
from sterna.core.rundir import FolderLock
from sterna.kernels.load import load_kernels

KINDS = {
    "grpo": {"kind": "grpo"},
    "grpo_kl": {"kind": "grpo", "kl_coef": 0.1, "epochs": 2, "minibatches": 2},
    "rloo": {"kind": "rloo", "kl_coef": 0.05},
    "reinforce": {"kind": "reinforce", "kl_coef": 0.05},
    "ppo": {"kind": "ppo", "kl_coef": 0.05, "epochs": 2},
}


def lines(folder, name="metrics.jsonl"):
    found = [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]
    return [line for line in found if line.get("kind") != "alarm"]


class Stop(RlHook):
    """As a signal would, after a step."""

    def __init__(self, step):
        self._step = step

    def after_step(self, trainer, step, figures, experience):
        if step == self._step:
            trainer.outcome = "interrupted"


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_update_starts_at_ratio_one_and_kl_zero(tmp_path, kind):
    result = align_rl(recipe(tmp_path, algorithm=KINDS[kind], run={"steps": 1}), rewards=[Low()])
    assert result.outcome == "done"
    (line,) = lines(tmp_path)
    if load_kernels().level == "cpu":
        assert line["sampling/sampling_logp_difference/max"] == 0.0
        assert line["sampling/importance_sampling_ratio/max"] == 1.0
        if KINDS[kind].get("epochs", 1) == 1:
            assert line["ratio/max"] == line["ratio/min"] == 1.0
            assert line["clip_ratio/low_mean"] == line["clip_ratio/high_mean"] == 0.0
        if "kl_coef" in KINDS[kind]:
            assert line["kl"] == 0.0
    assert line["grad_norm"] > 0


def gold(samples):
    """Not rewarded, but implied by it in part."""
    return [float((s.rollout.completion < 120).mean()) for s in samples]


@pytest.mark.parametrize(
    ("kind", "seed"),
    [("grpo", 0), ("rloo", 1), ("reinforce", 2), ("ppo", 0)]
    + [
        pytest.param(kind, seed, marks=pytest.mark.slow)
        for kind in ("grpo", "rloo", "reinforce", "ppo")
        for seed in (0, 1, 2)
        if (kind, seed) not in (("grpo", 0), ("rloo", 1), ("reinforce", 2), ("ppo", 0))
    ],
)
def test_rewards_rise(tmp_path, monkeypatch, kind, seed):
    """The last tenth against the first; what is not rewarded rises too; KL stays in a band."""
    monkeypatch.setattr(Arithmetic, "gold", lambda self, samples: gold(samples))
    settings = {"steps": 24, "samples": 0, "seed": seed}
    rollout = {"prompts_per_step": 4, "group_size": 8}
    critic = {"optim": {"lr": 3e-3}}
    align_rl(
        recipe(
            tmp_path, algorithm={"kind": kind, "kl_coef": 0.01}, run=settings, rollout=rollout,
            critic=critic, optim={"lr": 3e-3}, checkpoint={"every": 0},
        ),
        rewards=[Low()],
    )  # fmt: skip
    found = lines(tmp_path)
    for name, rise in (("reward", 0.15), ("rewards/gold/mean", 0.1)):
        values = [line[name] for line in found]
        assert sum(values[-3:]) / 3 > sum(values[:3]) / 3 + rise, name
    assert 0 < found[-1]["kl"] < 20  # nats a completion of 6 tokens
    assert all(line["completions/mean_length"] > 1 for line in found)


@pytest.mark.parametrize("kind", ["grpo_kl", "ppo"])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, kind):
    extra = {"optim": {"lr": 1e-3, "ema_decay": 0.9}, "algorithm": KINDS[kind]}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    align_rl(recipe(whole, **extra), rewards=[Low()])
    result = align_rl(recipe(cut, **extra), rewards=[Low()], hooks=[Stop(1)])
    assert result.outcome == "interrupted"
    with pytest.raises(ConfigError, match="--resume"):
        align_rl(recipe(cut, **extra), rewards=[Low()])
    align_rl(recipe(cut, **extra), rewards=[Low()], resume=True)
    a, b = lines(whole), lines(cut)
    assert [line["step"] for line in b] == [1, 2, 3]
    timed = ("time/", "tokens_per_s/", "samples_per_s")
    for one, other in zip(a, b, strict=True):
        for name in one:
            assert one[name] == other[name] or name.startswith(timed), name
    first, second = (load_file(f / "run" / "model" / "model.safetensors") for f in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_folder_has_one_run(tmp_path):
    lock = FolderLock(tmp_path / "run")
    (tmp_path / "run").mkdir()
    assert lock.take()
    with pytest.raises(ConfigError, match="another process is training into"):
        align_rl(recipe(tmp_path), rewards=[Low()])
    lock.release()
    assert align_rl(recipe(tmp_path, run={"steps": 1}), rewards=[Low()]).outcome == "done"


def test_a_changed_recipe_is_not_resumed(tmp_path):
    align_rl(recipe(tmp_path), rewards=[Low()], hooks=[Stop(1)])
    with pytest.raises(ConfigError, match=r"algorithm\.eps_low \(0\.2, now 0\.1\)"):
        align_rl(recipe(tmp_path, algorithm={"kind": "grpo", "eps_low": 0.1}), resume=True)


@pytest.mark.parametrize("kind", ["ppo", "grpo_kl"])
def test_a_dumped_step_replays_to_the_same_gradient(tmp_path, kind):
    settings = {"algorithm": KINDS[kind], "run": {"dump": True}}
    align_rl(recipe(tmp_path, **settings), rewards=[Low()])
    dump = tmp_path / "run" / "rollouts" / "step-00000002.safetensors"
    experience, figures = read_dump(dump)
    assert len(experience.rollouts) == 16
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    found = replay(recipe(tmp_path, **settings), dump)
    assert found.is_identical
    assert found.then["grad_norm"] == figures["grad_norm"]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_step_without_the_checkpoint_before_it_is_not_replayed(tmp_path):
    settings = {"run": {"dump": True}, "checkpoint": {"every": 3}}
    align_rl(recipe(tmp_path, **settings), rewards=[Low()])
    with pytest.raises(TrainError, match=r"step-00000001 .*complete: step-00000003"):
        replay(
            recipe(tmp_path, **settings),
            tmp_path / "run" / "rollouts" / "step-00000002.safetensors",
        )


def test_micro_batches_do_not_change_the_gradient(tmp_path):
    norms = []
    for i, micro in enumerate((10_000, 40)):
        folder = tmp_path / str(i)
        folder.mkdir()
        algorithm = {**KINDS["grpo_kl"], "micro_tokens": micro}
        align_rl(recipe(folder, algorithm=algorithm, run={"steps": 1}), rewards=[Low()])
        norms.append(lines(folder)[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


class Bad(Low):
    """Gives one number that is none, or raises."""

    def __init__(self, value):
        self._value = value

    def __call__(self, samples):
        if self._value is None:
            raise RuntimeError("no lexicon")
        return [self._value, *super().__call__(samples)[1:]]


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_failing_reward_is_named_before_anything_is_trained(tmp_path, value):
    with pytest.raises(RewardError, match=r"low (is (nan|inf)|raised RuntimeError: no lexicon)"):
        align_rl(recipe(tmp_path), rewards=[Bad(value)])


def test_a_failing_reward_may_be_survived(tmp_path):
    (tmp_path / "r.py").write_text(
        "def f(prompts, completions, answer):\n"
        "    return [float('nan')] + [float(len(c)) for c in completions[1:]]\n"
    )
    section = {"kind": "function", "path": f"{tmp_path / 'r.py'}:f", "on_error": "drop"}
    made = recipe(tmp_path, run={"steps": 1})
    made = made.model_copy(update={"rewards": (type(made.rewards[0]).model_validate(section),)})
    align_rl(made)
    (line,) = lines(tmp_path)
    assert line["completions/dropped"] == 1


def test_no_completion_left_stops_the_run(tmp_path):
    (tmp_path / "r.py").write_text("def f(prompts, completions, answer):\n    raise ValueError\n")
    section = {"kind": "function", "path": f"{tmp_path / 'r.py'}:f", "on_error": "drop"}
    made = recipe(tmp_path)
    made = made.model_copy(update={"rewards": (type(made.rewards[0]).model_validate(section),)})
    with pytest.raises(TrainError, match="no completion is left"):
        align_rl(made)


def test_equal_groups_are_counted_and_drawn_anew(tmp_path):
    class Equal(Low):
        def __call__(self, samples):
            return [1.0] * len(samples)

    algorithm = {"kind": "grpo", "dynamic_sampling": 2}
    align_rl(recipe(tmp_path, algorithm=algorithm, run={"steps": 1}), rewards=[Equal()])
    (line,) = lines(tmp_path)
    assert line["frac_reward_zero_std"] == 1.0
    assert line["grad_norm"] == 0.0
    assert line["completions/dropped"] == 32  # drawn twice more, then taken as they are


def test_a_gradient_that_is_not_finite_leaves_the_weights(tmp_path):
    class Nan(RlHook):
        def on_start(self, trainer):
            make = trainer.make_experience

            def broken(prompts, rollouts, rewards):
                experience = make(prompts, rollouts, rewards)
                return replace(experience, advantages=experience.advantages * math.nan)

            trainer.make_experience = broken

    with pytest.raises(NonFiniteError, match=r"step 1: the gradient norm .* saved in"):
        align_rl(recipe(tmp_path), rewards=[Low()], hooks=[Nan()])
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000000" / "model.safetensors")
    start = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], start[name]) for name in saved)


def test_speculation_changes_times_only(tmp_path):
    plain, guessing = tmp_path / "plain", tmp_path / "guessing"
    for folder, is_on in ((plain, False), (guessing, True)):
        folder.mkdir()
        align_rl(recipe(folder, rollout={"speculation": is_on, "max_tokens": 24}), rewards=[Low()])
    a, b = lines(plain), lines(guessing)
    for one, other in zip(a, b, strict=True):
        assert other["speculation/accepted"] <= other["speculation/drafted"]
        assert all(one[name] == other[name] for name in ("reward", "loss", "grad_norm"))


def test_six_bit_rollouts_are_corrected(tmp_path):
    align_rl(recipe(tmp_path, rollout={"weights": "fp6"}), rewards=[Low()])
    for line in lines(tmp_path):
        assert 0 < line["sampling/sampling_logp_difference/mean"] < 0.2
