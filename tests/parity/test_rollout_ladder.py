"""Rollouts of a model in training: the same bits however the engine works, the new weights always.

Tokens and log-probs may not depend on what runs beside a completion, on prefix hits, on how prompts
are cut, or on preemptions; and after an update they are the trainer's, not those of before.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch

from sterna.align.config import AlgorithmSection
from sterna.align.experience import Models, make_experience
from sterna.align.hybrid import HybridEngine, Sampling
from sterna.align.learner import Learner, Trained
from sterna.align.reward import Rewards
from sterna.align.rollout import rollout_logprobs
from sterna.align.score import completion_logprobs, micro_batches
from sterna.engine.config import EngineConfig
from sterna.kernels.load import load_kernels
from sterna.kernels.scores import Distribution
from sterna.model.load import load_model
from sterna.quant.linear import quant_modules
from sterna.text.tokenizer import load_tokenizer
from sterna.train.config import OptimSection
from sterna.train.gradients import Gradients
from sterna.train.optim import AdamW
from sterna.train.parts import trained

_TINY = Path(__file__).parents[1] / "unit" / "train" / "tiny.py"
# Two of them share whole blocks of 16.
PROMPTS = [[10, 11, 12], list(range(30, 75)), [*range(30, 70), 7, 8], list(range(90, 110))]
SEEDS = [3, 1, 4, 1]
GROUP = 3
SAMPLINGS = {
    "plain": Sampling(max_tokens=24),
    "cold": Sampling(max_tokens=24, temperature=0.6),
    "top_p": Sampling(max_tokens=24, temperature=0.6, top_p=0.9),
}
ENGINES = {  # beside a comfortable engine
    "one sequence at a time": {"max_num_seqs": 1},
    "few tokens a step": {"token_budget": 16, "max_num_seqs": 4},
    "no prefix cache": {"enable_prefix_cache": False},
    "preempted": {"num_kv_blocks": 20},
    "whole prompts": {"policy": "whole-prompt"},
    "two threads": {"threads": 2},
}


@pytest.fixture(autouse=True)
def _native():
    if load_kernels().level != "cpu":
        pytest.skip("equal bits are promised by the C++ kernels only")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("ladder_tiny", _TINY)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    return tiny.write_model(tmp_path_factory.mktemp("ladder"))


def make(folder, weights="policy", dtype="float32", **changed):
    model = load_model(folder, dtype).decoder
    config = {
        "token_budget": 128, "num_kv_blocks": 128, "dtype": dtype, "threads": 1, **changed,
    }  # fmt: skip
    return model, HybridEngine(
        model, load_tokenizer(folder), EngineConfig.model_validate(config), weights
    )


def said(rollouts):
    return [r.completion.tolist() for r in rollouts], rollout_logprobs(rollouts)


@pytest.fixture(scope="module")
def wanted(folder):
    """Of the comfortable engine, and equal to the trainer's."""
    load_kernels()
    model, hybrid = make(folder)
    found = {}
    for name, sampling in SAMPLINGS.items():
        rollouts = hybrid.generate(PROMPTS, GROUP, sampling, SEEDS)
        distribution = Distribution(sampling.temperature, sampling.top_k, sampling.top_p)
        with torch.no_grad():
            parts = [
                completion_logprobs(model, part, distribution)[0]
                for part in micro_batches(rollouts, 100)
            ]
        assert torch.equal(torch.cat(parts), rollout_logprobs(rollouts))
        found[name] = said(rollouts)
    return found


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("engine", ENGINES)
def test_rollouts_do_not_know_how_the_engine_works(folder, wanted, engine, name):
    _, hybrid = make(folder, **ENGINES[engine])
    preempted = []
    hybrid.engine.on_step.append(lambda stats: preempted.append(stats.num_preempted))
    tokens, logprobs = said(hybrid.generate(PROMPTS, GROUP, SAMPLINGS[name], SEEDS))
    assert tokens == wanted[name][0]
    assert torch.equal(logprobs, wanted[name][1])
    if engine == "preempted":
        assert sum(preempted) > 0
    tokens, logprobs = said(hybrid.generate(PROMPTS, GROUP, SAMPLINGS[name], SEEDS))
    assert tokens == wanted[name][0], "with every prefix in the cache"
    assert torch.equal(logprobs, wanted[name][1])


def checksums(model):
    """SHA-256 of each tensor a forward reads."""
    found = {name: tensor.detach() for name, tensor in model.named_parameters()}
    for name, module in quant_modules(model):
        found |= {f"{name}.tiles": module.tiles, f"{name}.scales": module.scales}
    return {
        name: hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in found.items()
    }


def step(model, hybrid, rollouts):
    """One GRPO step of a large learning rate, as a run makes it."""
    settings = AlgorithmSection(kind="grpo")
    totals = torch.tensor([float((r.completion < 100).mean()) for r in rollouts]).double()
    rewards = Rewards(totals, {}, torch.ones(len(rollouts), dtype=torch.bool))
    experience = make_experience(rollouts, rewards, Models(None, None, None), settings, 0.0)
    own = Trained(
        model, AdamW(trained(model), OptimSection(), 0), Gradients(model.parameters()), 1.0
    )
    learner = Learner(own, None, settings, Distribution(), "none", 0, torch.device("cpu"))
    learner.learn(experience, 0, 0.0, 0.1, 0.0, 24)
    hybrid.publish()


def score(model, rollouts):
    with torch.no_grad():
        return completion_logprobs(model, rollouts)[0]


@pytest.mark.parametrize("is_asleep", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_is_seen_at_once(folder, dtype, is_asleep):
    model, hybrid = make(folder, dtype=dtype)
    before = hybrid.generate(PROMPTS, GROUP, SAMPLINGS["plain"], SEEDS)
    old, sums = score(model, before), checksums(model)
    if is_asleep:
        hybrid.sleep()
    step(model, hybrid, before)
    after = hybrid.generate(PROMPTS, GROUP, SAMPLINGS["plain"], SEEDS)
    assert {r.policy_version for r in after} == {1}
    assert torch.equal(rollout_logprobs(after), score(model, after))
    assert not torch.equal(score(model, before), old)
    served = hybrid._served
    assert checksums(served) == checksums(model)
    assert {n: p.data_ptr() for n, p in served.named_parameters()} == {
        n: p.data_ptr() for n, p in model.named_parameters()
    }
    assert all(a != b for a, b in zip(sums.values(), checksums(model).values(), strict=True))


def test_a_quantised_copy_is_made_anew(folder):
    """After the step its tensors are those of a fresh copy of the new weights, bit by bit."""
    model, hybrid = make(folder, "fp6")
    before = hybrid.generate(PROMPTS, GROUP, SAMPLINGS["plain"], SEEDS)
    old = checksums(hybrid._served)
    hybrid.sleep()
    step(model, hybrid, before)
    other, fresh = make(folder, "fp6")
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    fresh.publish()
    now = checksums(hybrid._served)
    assert now == checksums(fresh._served)
    changed = [name for name in now if now[name] != old[name]]
    assert len(changed) == len(now)
    rollouts = [h.generate(PROMPTS, GROUP, SAMPLINGS["plain"], SEEDS) for h in (hybrid, fresh)]
    assert said(rollouts[0])[0] == said(rollouts[1])[0]
    assert torch.equal(said(rollouts[0])[1], said(rollouts[1])[1])
