"""Policies that are a base with an adapter: the ladder's identities, sharing, resume, files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tests.unit.align.runs import Low, recipe

from sterna.align.adapted import load_policy, shared_critic, shares_base
from sterna.align.build import build
from sterna.align.config import RewardSection
from sterna.align.hybrid import HybridEngine, Sampling
from sterna.align.rl import align_rl
from sterna.align.rlhooks import RlHook
from sterna.align.rollout import rollout_logprobs
from sterna.align.score import completion_logprobs
from sterna.core.errors import ConfigError
from sterna.engine.config import EngineConfig
from sterna.kernels.load import load_kernels
from sterna.kernels.scores import Distribution
from sterna.model.load import load_model
from sterna.model.peft import CONFIG_NAME, WEIGHTS_NAME, read_peft
from sterna.model.save import save_model
from sterna.text.tokenizer import load_tokenizer
from sterna.train.adapter import adapted_modules, add_adapter
from sterna.train.adapter_config import AdapterConfig
from sterna.train.adapter_file import load_adapter

ADAPTER = {"rank": 4, "alpha": 8}
KINDS = {
    "grpo_kl": {"kind": "grpo", "kl_coef": 0.1},
    "rloo": {"kind": "rloo", "kl_coef": 0.05},
    "ppo": {"kind": "ppo", "kl_coef": 0.05},
}
PROMPTS = [[10, 11, 12], list(range(30, 85)), [*range(30, 50), 7, 8]]


@pytest.fixture(autouse=True)
def _native():
    if load_kernels().level != "cpu":
        pytest.skip("equal bits are promised by the C++ kernels only")


def adapted(folder, **sections):
    sections = {"optim": {"lr": 1e-2}, **sections}
    return recipe(folder, adapter=ADAPTER, **sections)


def lines(folder):
    return [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def stir(decoder, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in adapted_modules(decoder):
            for part in module.adapters():
                part.B.add_(0.2 * torch.randn(part.B.shape, generator=generator))


def policy_of(folder, dtype="float32", weights="auto"):
    values = recipe(folder, adapter=ADAPTER, model={"dtype": dtype, "weights": weights})
    return load_policy(values, folder / "model", None, torch.device("cpu"))


def hybrid_of(folder, policy, weights="policy"):
    name = str(policy.dtype).removeprefix("torch.")
    config = EngineConfig(token_budget=32, num_kv_blocks=64, dtype=name, threads=1)
    return HybridEngine(policy, load_tokenizer(folder / "model"), config, weights)


def trained_logprobs(model, rollouts, sampling):
    distribution = Distribution(sampling.temperature, sampling.top_k, sampling.top_p)
    return completion_logprobs(model, rollouts, distribution)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_update_starts_at_ratio_one_and_kl_zero(tmp_path, kind):
    align_rl(adapted(tmp_path, algorithm=KINDS[kind], run={"steps": 1}), rewards=[Low()])
    (line,) = lines(tmp_path)
    assert line["sampling/sampling_logp_difference/max"] == 0.0
    assert line["sampling/importance_sampling_ratio/max"] == 1.0
    assert line["ratio/max"] == line["ratio/min"] == 1.0
    assert line["kl"] == 0.0
    assert line["grad_norm"] > 0


@pytest.mark.parametrize("weights", ["auto", "fp6", "int4-g32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}])
def test_rollout_logprobs_are_the_trainers_to_the_bit(tmp_path, dtype, weights, sampling):
    policy = policy_of(tmp_path, dtype, weights)
    stir(policy)
    hybrid, settings = hybrid_of(tmp_path, policy), Sampling(max_tokens=20, **sampling)
    rollouts = hybrid.generate(PROMPTS, 3, settings, seeds=[1, 2, 3])
    wanted = trained_logprobs(policy, rollouts, settings)  # with a graph, as a step does
    assert wanted.requires_grad
    assert torch.equal(rollout_logprobs(rollouts), wanted.detach())
    assert hybrid.engine.runner.captured is not None


def test_one_step_at_a_high_rate_is_seen_by_the_next_rollout(tmp_path):
    seen = {}

    class Look(RlHook):
        def after_step(self, trainer, step, figures, experience):
            settings = Sampling(max_tokens=12)
            rollouts = trainer.parts.hybrid.generate(PROMPTS, 2, settings, seeds=[5, 6, 7])
            seen[step] = rollouts
            model = trainer.parts.learner.policy.model
            wanted = trained_logprobs(model, rollouts, settings).detach()
            assert torch.equal(rollout_logprobs(rollouts), wanted)

    values = recipe(tmp_path, adapter=ADAPTER, optim={"lr": 0.1}, run={"steps": 2})
    align_rl(values, rewards=[Low()], hooks=[Look()])
    assert [r.policy_version for r in seen[1]] == [1] * 6
    assert not torch.equal(rollout_logprobs(seen[1])[:8], rollout_logprobs(seen[2])[:8])


def test_rewards_rise(tmp_path):
    """The frozen head of a fresh model hardly tells tokens apart, so it is made louder."""
    recipe(tmp_path)
    decoder = load_model(tmp_path / "model", "float32").decoder
    decoder.norm.weight.data.mul_(8)
    save_model(decoder, tmp_path / "model")
    rollout = {"prompts_per_step": 4, "group_size": 8}
    settings = adapted(
        tmp_path, run={"steps": 24}, rollout=rollout, checkpoint={"every": 0}, optim={"lr": 3e-2},
    )  # fmt: skip
    align_rl(settings, rewards=[Low()])
    found = [line["reward"] for line in lines(tmp_path) if line["kind"] == "step"]
    assert np.mean(found[-4:]) > 0.9 > 0.8 > np.mean(found[:4])


class Stop(RlHook):
    def __init__(self, step):
        self._step = step

    def after_step(self, trainer, step, figures, experience):
        if step == self._step:
            trainer.outcome = "interrupted"


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_resumed_run_ends_at_the_same_bits(tmp_path, kind):
    algorithm = {"kind": kind, "kl_coef": 0.05}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    align_rl(adapted(whole, algorithm=algorithm), rewards=[Low()])
    align_rl(adapted(cut, algorithm=algorithm), rewards=[Low()], hooks=[Stop(1)])
    align_rl(adapted(cut, algorithm=algorithm), resume=True, rewards=[Low()])
    one, two = (load_file(f / "run" / "model" / WEIGHTS_NAME) for f in (whole, cut))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(bool(v.any()) for n, v in one.items() if "lora_B" in n)


def test_the_saved_model_is_the_adapter_alone_and_says_what_the_policy_says(tmp_path):
    trainers = []

    class Keep(RlHook):
        def on_start(self, trainer):
            trainers.append(trainer)

    align_rl(adapted(tmp_path), rewards=[Low()], hooks=[Keep()])
    folder = tmp_path / "run" / "model"
    assert {WEIGHTS_NAME, CONFIG_NAME, "tokenizer.json"} <= {p.name for p in folder.iterdir()}
    assert not (folder / "model.safetensors").exists()
    assert read_peft(folder).config["base_model_name_or_path"] == str(tmp_path / "model")
    decoder = load_model(tmp_path / "model", "float32").decoder
    load_adapter(decoder, folder)
    policy = trainers[0].parts.learner.policy.model
    settings = Sampling(max_tokens=8)
    rollouts = hybrid_of(tmp_path, decoder).generate(PROMPTS, 1, settings, seeds=[1, 2, 3])
    wanted = trained_logprobs(policy, rollouts, settings).detach()
    assert torch.equal(rollout_logprobs(rollouts), wanted)


def test_all_models_hold_the_base_once(tmp_path):
    algorithm = {"kind": "ppo", "kl_coef": 0.05}
    trainer = build(adapted(tmp_path, algorithm=algorithm), rewards=[Low()])
    learner = trainer.parts.learner
    policy, critic = learner.policy.model, learner.critic.model
    base = {id(p) for n, p in policy.named_parameters() if not p.requires_grad}
    frozen = {id(p) for n, p in critic.named_parameters() if not p.requires_grad}
    assert frozen <= base
    own = {id(p) for p in critic.parameters() if p.requires_grad}
    assert not own & {id(p) for p in policy.parameters()}
    sizes = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (policy, critic)]
    assert max(sizes) < 0.5 * sum(p.numel() for p in policy.parameters() if not p.requires_grad)
    trainer.parts.hybrid.close()


def test_a_critic_of_another_model_is_whole(tmp_path):
    other = {"path": str(tmp_path / "other")}
    (tmp_path / "other").mkdir()
    from tests.unit.align.runs import tiny

    tiny.write_model(tmp_path / "other", seed=3)
    algorithm = {"kind": "ppo"}
    assert shares_base(adapted(tmp_path, algorithm=algorithm))
    assert not shares_base(adapted(tmp_path, algorithm=algorithm, critic=other))
    assert not shares_base(adapted(tmp_path, algorithm=algorithm, critic={"shared": False}))
    with pytest.raises(ConfigError, match=r"critic\.shared"):
        shares_base(adapted(tmp_path, algorithm=algorithm, critic={**other, "shared": True}))
    with pytest.raises(ConfigError, match=r"critic\.shared"):
        shares_base(recipe(tmp_path, algorithm=algorithm, critic={"shared": True}))


def test_a_critic_starts_at_zero_and_leaves_the_policy_alone(tmp_path):
    from sterna.align.score import rollout_batch

    policy = policy_of(tmp_path)
    stir(policy)
    settings = Sampling(max_tokens=8)
    rollouts = hybrid_of(tmp_path, policy).generate(PROMPTS, 1, settings, seeds=[1, 2, 3])
    before = trained_logprobs(policy, rollouts, settings).detach()
    critic = shared_critic(recipe(tmp_path, adapter=ADAPTER), policy)
    stir(critic.trunk, 9)
    critic.values(rollout_batch(rollouts, torch.device("cpu"))).sum().backward()
    assert critic.score.grad.abs().max() > 0
    assert all(p.grad is None for p in policy.parameters())
    assert torch.equal(trained_logprobs(policy, rollouts, settings).detach(), before)


@pytest.mark.parametrize("weights", ["merged", "fp6"])
def test_copies_follow_the_policy_and_say_they_are_none(tmp_path, weights):
    policy = policy_of(tmp_path)
    hybrid, settings = hybrid_of(tmp_path, policy, weights), Sampling(max_tokens=12)
    assert not hybrid.is_exact
    bound = 1e-5 if weights == "merged" else 0.3  # float32 sums; six bits
    for seed in (1, 2):
        rollouts = hybrid.generate(PROMPTS, 2, settings, seeds=[5, 6, 7])
        gap = rollout_logprobs(rollouts) - trained_logprobs(policy, rollouts, settings).detach()
        assert gap.abs().mean() < bound
        stir(policy, seed)
        hybrid.publish()
    assert gap.abs().max() > 0


def test_merged_rollouts_are_corrected(tmp_path):
    values = adapted(tmp_path, rollout={"weights": "merged"})
    align_rl(values, rewards=[Low()])
    last = lines(tmp_path)[-1]
    assert 0 < last["sampling/sampling_logp_difference/max"] < 1e-3


def test_refusals(tmp_path):
    with pytest.raises(ValidationError, match="dora"):
        recipe(tmp_path, adapter={**ADAPTER, "kind": "dora"})
    with pytest.raises(ValidationError, match="dropout"):
        recipe(tmp_path, adapter={**ADAPTER, "dropout": 0.1})
    plain = load_model(tmp_path / "model", "float32").decoder
    with pytest.raises(ConfigError, match="no \\[adapter\\]"):
        hybrid_of(tmp_path, plain, "merged")
    with pytest.raises(ConfigError, match="quantised"):
        hybrid_of(tmp_path, policy_of(tmp_path, weights="fp6"), "merged")


def test_a_reward_model_of_the_same_base_is_an_adapter_beside_the_policy(tmp_path):
    from safetensors.torch import save_file

    from sterna.align.rewards import make_rewards
    from sterna.model.value import HEAD_NAME, SCORE, ValueModel
    from sterna.train.adapter_file import save_adapter

    section = RewardSection(kind="model", path=str(tmp_path / "rm"))
    values = adapted(tmp_path).model_copy(update={"rewards": (section,)})
    reward_model = ValueModel(load_model(tmp_path / "model", "float32").decoder)
    add_adapter(reward_model.trunk, AdapterConfig(rank=3), seed=4)
    stir(reward_model.trunk, 5)
    torch.nn.init.normal_(reward_model.score)
    save_adapter(reward_model.trunk, tmp_path / "rm", str(tmp_path / "model"))
    save_file({SCORE: reward_model.score.detach()}, tmp_path / "rm" / HEAD_NAME)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "rm" / name).write_bytes((tmp_path / "model" / name).read_bytes())
    policy = policy_of(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "model")
    ((_, reward, _),) = make_rewards(values, (), None, tokenizer, policy)._rewards
    shared = {id(p) for p in policy.parameters()}
    whole = [p for p in reward._model.parameters() if id(p) not in shared]
    assert sum(p.numel() for p in whole) < 0.4 * sum(p.numel() for p in policy.parameters())
    from sterna.align.score import rollout_batch

    rollouts = hybrid_of(tmp_path, policy).generate(PROMPTS, 1, Sampling(max_tokens=5), [1, 2, 3])
    batch = rollout_batch(rollouts, torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(reward._model.values(batch), reward_model.values(batch))


def test_other_processes_are_sent_the_adapter_alone_and_draw_the_same(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, workers in ((one, 0), (two, 1)):
        folder.mkdir()
        values = adapted(folder, rollout={"workers": workers}, run={"steps": 2})
        align_rl(values, rewards=[Low()])
    found = [load_file(f / "run" / "model" / WEIGHTS_NAME) for f in (one, two)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
