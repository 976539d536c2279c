"""Completions with tools between the turns: the trainer's bits on what the policy wrote."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.unit.align.runs import Low, recipe

from sterna.align.draw import EngineDraw
from sterna.align.dump import read_dump
from sterna.align.hybrid import HybridEngine, Sampling
from sterna.align.rl import align_rl
from sterna.align.rollout import completion_layout, rollout_logprobs
from sterna.align.score import completion_logprobs
from sterna.align.tools.protocol import PlainProtocol
from sterna.align.tools.toolbox import Toolbox, ToolRequest
from sterna.align.tools.turns import ToolTurns
from sterna.engine.config import EngineConfig
from sterna.kernels.load import load_kernels
from sterna.kernels.scores import Distribution
from sterna.model.load import load_model
from sterna.text.tokenizer import load_tokenizer

_TINY = Path(__file__).parents[1] / "unit" / "train" / "tiny.py"
PROMPTS = [[10, 11, 12], list(range(30, 55)), [*range(30, 50), 7, 8]]
SAMPLINGS = [
    Sampling(max_tokens=160),
    Sampling(max_tokens=160, temperature=0.6),
    Sampling(max_tokens=160, temperature=1.3, top_p=0.9),
]


class Often(PlainProtocol):
    """A random model writes no call: here, one that ends in a common byte is one."""

    stop = tuple("abcdefghijkl")

    def calls(self, text):
        return [ToolRequest("shout", text[-5:])] if text and text[-1] in self.stop else []


@pytest.fixture(autouse=True)
def _native():
    if load_kernels().level != "cpu":
        pytest.skip("equal bits are promised by the C++ kernels only")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("turns_tiny", _TINY)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    return tiny.write_model(tmp_path_factory.mktemp("turns"))


@pytest.fixture(scope="module")
def toolbox(tmp_path_factory):
    file = tmp_path_factory.mktemp("tools") / "mine.py"
    file.write_text("def shout(text):\n    return 'you said ' + text.upper()\n")
    box = Toolbox([f"{file}:shout"], 5.0)
    yield box
    box.close()


def make(folder, toolbox, dtype="float32"):
    model = load_model(folder, dtype).decoder
    tokenizer = load_tokenizer(folder)
    config = EngineConfig(token_budget=32, num_kv_blocks=160, dtype=dtype, threads=1)
    hybrid = HybridEngine(model, tokenizer, config)
    return model, hybrid, ToolTurns(hybrid, tokenizer, toolbox, Often(tokenizer, 40), 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_turns_logprobs_are_the_trainers_to_the_bit(folder, toolbox, dtype, sampling):
    model, hybrid, turns = make(folder, toolbox, dtype)
    cached = []
    step = hybrid.engine.step

    def watched():
        outputs = step()
        cached.extend(o.num_cached_tokens for o in outputs)
        return outputs

    hybrid.engine.step = watched
    rollouts = turns.generate(PROMPTS, 3, sampling, seeds=[1, 2, 3])
    assert [(r.prompt_idx, r.sample_idx) for r in rollouts] == [
        (i, j) for i in range(3) for j in range(3)
    ]
    assert sum(len(r.turns()) > 2 for r in rollouts) > 2
    assert max(cached) > 64  # later turns found the earlier ones' blocks
    distribution = Distribution(sampling.temperature, sampling.top_k, sampling.top_p)
    with torch.no_grad():
        wanted, _ = completion_logprobs(model, rollouts, distribution)
    mask = completion_layout(rollouts).mask
    assert torch.equal(rollout_logprobs(rollouts)[mask], wanted[mask])
    assert not rollout_logprobs(rollouts)[~mask].any()
    again = turns.generate(PROMPTS, 3, sampling, seeds=[1, 2, 3])
    assert [r.completion.tolist() for r in again] == [r.completion.tolist() for r in rollouts]


class WithTools(Low):
    """Gives the run's rollouts tools that a random model calls."""

    def __init__(self, toolbox):
        self.toolbox = toolbox
        self.seen = []

    def __call__(self, samples):
        self.seen += samples
        return super().__call__(samples)


def run(folder, toolbox, monkeypatch, **sections):
    monkeypatch.setattr(
        "sterna.align.build.make_draw",
        lambda recipe, hybrid, tokenizer, _: EngineDraw(
            hybrid, None, ToolTurns(hybrid, tokenizer, toolbox, Often(tokenizer, 40), 3)
        ),
    )
    reward = WithTools(toolbox)
    values = {"rollout": {"max_tokens": 120}, "run": {"steps": 1, "dump": True}}
    align_rl(recipe(folder, **{**values, **sections}), rewards=[reward])
    return reward.seen


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_the_loop_learns_from_the_policys_tokens_only(tmp_path, toolbox, monkeypatch, kind):
    algorithm = {"kind": kind, "kl_coef": 0.05, "micro_tokens": 512}
    seen = run(tmp_path, toolbox, monkeypatch, algorithm=algorithm)
    assert any(len(sample.turns) > 1 for sample in seen)
    sample = next(sample for sample in seen if len(sample.turns) > 1)
    assert sample.answer == sample.turns[-1]
    assert "<result>you said " in sample.completion
    assert not any("<result>" in turn for turn in sample.turns)
    experience, figures = read_dump(tmp_path / "run" / "rollouts" / "step-00000001.safetensors")
    mask = experience.layout.mask
    assert not mask.all()
    assert not experience.advantages[~mask].any()
    assert figures["tools/call_frequency"] > 0
    assert figures["kl"] == 0.0
    assert figures["ratio/max"] == figures["ratio/min"] == 1.0
    assert figures["sampling/sampling_logp_difference/max"] == 0.0


@pytest.mark.parametrize("staleness", [0, 1])
def test_other_processes_take_the_same_turns(tmp_path, toolbox, monkeypatch, staleness):
    """One step off too: a queued step's turns are all by the weights that drew its first."""
    written = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        rollout = {"max_tokens": 120, "workers": workers, "staleness": staleness}
        run(folder, toolbox, monkeypatch, rollout=rollout, run={"steps": 3, "dump": True})
        dumps = sorted((folder / "run" / "rollouts").iterdir())
        written.append([read_dump(dump)[0].rollouts for dump in dumps])
    assert len(written[0]) == 3
    for one, two in zip(*written, strict=True):
        assert any(len(rollout.turns()) > 1 for rollout in one)
        for a, b in zip(one, two, strict=True):
            assert a.policy_version == b.policy_version
            assert a.completion.tolist() == b.completion.tolist()
            assert a.logprobs.tolist() == b.logprobs.tolist()
            assert a.mask.tolist() == b.mask.tolist()


def test_answers_have_no_gradient(folder, toolbox):
    model, _, turns = make(folder, toolbox)
    rollouts = turns.generate(PROMPTS, 2, SAMPLINGS[0], seeds=[1, 2, 3])
    layout = completion_layout(rollouts)
    assert not layout.mask.all()
    from sterna.align.loss import PolicyLossSettings, policy_loss

    logprobs, _ = completion_logprobs(model, rollouts)
    logprobs.retain_grad()
    ones = torch.ones_like(logprobs)
    found = policy_loss(
        layout, logprobs, logprobs.detach(), ones, layout.mask.float(), PolicyLossSettings()
    )
    found.loss.backward()
    assert (logprobs.grad[~layout.mask] == 0).all()
    assert (logprobs.grad[layout.mask] == -1).all()


def test_a_dumped_step_with_tools_replays(tmp_path, toolbox, monkeypatch):
    from sterna.align.replay import replay

    steps = {"run": {"steps": 2, "dump": True}}
    run(tmp_path, toolbox, monkeypatch, **steps)
    import shutil

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    values = {"rollout": {"max_tokens": 120}, **steps}
    dump = tmp_path / "run" / "rollouts" / "step-00000002.safetensors"
    assert replay(recipe(tmp_path, **values), dump).is_identical


def test_resumed_runs_with_tools_are_the_same(tmp_path, toolbox, monkeypatch):
    weights = []
    for name, steps in (("whole", [2]), ("cut", [1, 2])):
        (tmp_path / name).mkdir()
        for i, count in enumerate(steps):
            monkeypatch.setattr(
                "sterna.align.build.make_draw",
                lambda recipe, hybrid, tokenizer, _: EngineDraw(
                    hybrid, None, ToolTurns(hybrid, tokenizer, toolbox, Often(tokenizer, 40), 3)
                ),
            )
            values = recipe(tmp_path / name, rollout={"max_tokens": 100}, run={"steps": count})
            align_rl(values, rewards=[Low()], resume=i > 0)
        weights.append(load_file(tmp_path / name / "run" / "model" / "model.safetensors"))
    assert all(np.array_equal(weights[0][k], weights[1][k]) for k in weights[0])
