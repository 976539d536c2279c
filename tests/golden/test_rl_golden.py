"""Reinforcement learning against what TRL computed.

ppo.json   rewards, GAE, policy and value loss of the last TRL with a PPO in parts, in float64: 1e-6
           is its rounding of the JSON (make_ppo_golden.py made it)
rl.json    two optimizer steps of TRL's GRPO and RLOO trainers on given completions and rewards,
           a whole float32 model, reference and AdamW on both sides (make_rl_golden.py made it)
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.golden.test_align_golden import decoder

from sterna.align.advantage import gae, token_rewards, whiten
from sterna.align.config import AlgorithmSection
from sterna.align.experience import Models, make_experience
from sterna.align.flat import layout_of, token_weights
from sterna.align.learner import Learner, Trained
from sterna.align.loss import PolicyLossSettings, policy_loss, value_loss
from sterna.align.reward import Rewards
from sterna.align.rollout import Rollout
from sterna.align.score import completion_logprobs
from sterna.kernels.scores import Distribution
from sterna.train.config import OptimSection
from sterna.train.gradients import Gradients
from sterna.train.optim import AdamW
from sterna.train.parts import trained

PPO, RL = (
    json.loads(Path(__file__).with_name(name).read_text()) for name in ("ppo.json", "rl.json")
)
CLOSE = {"rel": 1e-6, "abs": 1e-8}
# Log-probs of a few nats differ by an ulp (2e-7) between two float32 implementations, and the
# ratios, whose differences the loss is, with them.
MODEL_CLOSE = {"rel": 1e-5, "abs": 1e-6}
ALGORITHMS = {
    "grpo": {"aggregate": "sequence", "kl_coef": 0.04},
    "grpo_biased": {"aggregate": "sequence", "kl_coef": 0.04, "kl_unbiased": False},
    "dapo": {"aggregate": "token", "scale": "batch", "eps_high": 0.28},
    "dr_grpo": {"aggregate": "fixed", "scale": "none", "kl_coef": 0.04},
    "gspo": {"aggregate": "sequence", "ratio": "sequence", "eps_low": 0.05, "eps_high": 0.05},
    "cispo": {"aggregate": "token", "loss": "cispo"},
    # TRL's is a sum over tokens: ours over the length allowed, times that length.
    "rloo": {"kind": "rloo", "aggregate": "fixed", "kl_coef": 0.05},
}


@pytest.mark.parametrize("name", PPO["cases"])
def test_ppo(name):
    wanted = PPO["cases"][name]
    layout = layout_of(PPO["lengths"])
    given = {k: torch.tensor(v, dtype=torch.float64) for k, v in PPO["tokens"].items()}
    scores = torch.tensor(PPO["scores"], dtype=torch.float64)
    rewards = token_rewards(layout, scores, given["old"] - given["ref"], wanted["kl"])
    assert rewards.tolist() == pytest.approx(wanted["rewards"], **CLOSE)
    advantages, returns = gae(layout, rewards, given["old_values"], wanted["gamma"], wanted["lam"])
    assert returns.tolist() == pytest.approx(wanted["returns"], **CLOSE)
    advantages = whiten(advantages, layout.mask)
    assert advantages.tolist() == pytest.approx(wanted["advantages"], **CLOSE)
    weights = token_weights(layout, "token").double()
    new, values = given["new"].requires_grad_(), given["new_values"].requires_grad_()
    settings = PolicyLossSettings(eps_low=wanted["cliprange"], eps_high=wanted["cliprange"])
    policy = policy_loss(layout, new, given["old"], advantages, weights, settings)
    value, share = value_loss(
        values, given["old_values"], returns, weights, wanted["cliprange_value"]
    )
    for loss, at, key in ((policy.loss, new, "policy"), (value, values, "value")):
        assert float(loss.detach()) == pytest.approx(wanted[f"{key}_loss"], rel=1e-6, abs=1e-7)
        (grad,) = torch.autograd.grad(loss, at)
        # the weights 1 / 14 are float32 here
        assert grad.tolist() == pytest.approx(wanted[f"{key}_grad"], rel=1e-6, abs=1e-8)
    clipped = float(policy.clipped_low + policy.clipped_high)
    assert clipped == pytest.approx(wanted["policy_clipped"], rel=1e-6)
    assert float(share) == pytest.approx(wanted["value_clipped"], rel=1e-6)


def scored(model, rollouts):
    with torch.no_grad():
        return completion_logprobs(model, rollouts)[0]


def rollouts_of(model):
    found = []
    for group, prompt in enumerate(RL["prompts"]):
        for i, completion in enumerate(RL["completions"][group]):
            size = len(completion)
            found.append(
                Rollout(
                    group,
                    i,
                    np.array(prompt, np.int32),
                    np.array(completion, np.int32),
                    np.ones(size, np.bool_),
                    np.zeros(size, np.float32),
                    0,
                    completion[-1] != 1,
                )
            )
    parts = np.split(scored(model, found).numpy(), np.cumsum([len(r.completion) for r in found]))
    return [
        Rollout(r.prompt_idx, r.sample_idx, r.prompt, r.completion, r.mask, part, 0, r.is_truncated)
        for r, part in zip(found, parts, strict=False)
    ]


@pytest.mark.parametrize("name", RL["cases"])
def test_two_steps_of_a_trainer(name):
    wanted = RL["cases"][name]
    settings = AlgorithmSection.model_validate(ALGORITHMS[name])
    policy, reference = decoder(RL["policy_turn"]), decoder(RL["reference_turn"])
    totals = torch.tensor(RL["rewards"], dtype=torch.float64).flatten()
    rewards = Rewards(totals, {}, torch.ones(6, dtype=torch.bool))
    models = Models(None, lambda rollouts: scored(reference, rollouts), None)
    experience = make_experience(rollouts_of(policy), rewards, models, settings, settings.kl_coef)
    each = experience.layout.means(experience.advantages)
    assert each.tolist() == pytest.approx(wanted["advantages"], **MODEL_CLOSE)
    optim = OptimSection(lr=RL["lr"], beta2=0.999)
    own = Trained(policy, AdamW(trained(policy), optim, 0), Gradients(policy.parameters()), 1.0)
    learner = Learner(own, None, settings, Distribution(), "none", 0, torch.device("cpu"))
    size = RL["max_length"]
    scale = size if name == "rloo" else 1
    for line in wanted["steps"]:
        found = learner.learn(experience, 0, settings.kl_coef, RL["lr"], 0.0, size)
        if (
            name != "rloo"
        ):  # TRL's ratio there is one a completion: the same gradient, another value
            # AdamW's first step makes lr of the sign of a gradient that is near 0.
            assert found["loss"] == pytest.approx(line["loss"], rel=2e-5, abs=2e-6)
        assert scale * found["grad_norm"] == pytest.approx(line["grad_norm"], rel=2e-5)
        if name in ("dapo", "gspo"):
            for end in ("low_mean", "high_mean"):
                key = f"clip_ratio/{end}"
                assert found[key] == pytest.approx(line[key], abs=1e-6)
    if name == "rloo":
        return  # the clip of the gradient norm does not know the scale
    moved = torch.cat([p.detach().flatten() for p in policy.parameters()]).double()
    assert float(moved.square().sum()) == pytest.approx(wanted["weights_square"], rel=1e-5)
