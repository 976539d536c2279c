"""The optimum of a KL-regularised reward is known: pi* = pi_ref exp(r / beta) / Z.

Each algorithm is run through the real experience and learner on a policy that is a table and has to
come within KL(pi || pi*) < 1e-3 of it. What differs from the textbook is in the closed form too:
GRPO's baseline contains the completion itself, so its reward counts (G - 1) / G; k3 in the loss
without the ratio is another regulariser, with another optimum.
"""

from __future__ import annotations

import pytest
import torch
from tests.unit.align.tables import Table, all_sequences, sequence_logprobs, train

from sterna.kernels.load import load_kernels

BETA = 0.5
GATE = 1e-3
GROUP = 8


@pytest.fixture(autouse=True)
def _kernels():
    load_kernels()
    torch.set_num_threads(1)


def problem(size, length):
    """(policy, reference, reward): a policy that starts elsewhere than at its reference."""
    generator = torch.Generator().manual_seed(5)
    states = 1 + size
    reference = Table(0.7 * torch.randn(states, size, generator=generator))
    policy = Table(0.7 * torch.randn(states, size, generator=generator))
    reward = torch.rand(*[size] * length, generator=generator).double()
    return policy, reference, reward


def optimum(reference, reward, length, beta):
    """[S] log-probs of pi*."""
    sequences = all_sequences(reward.shape[0], length)
    worth = torch.stack([reward[s] for s in sequences])
    return (sequence_logprobs(reference.log_table(), sequences) + worth / beta).log_softmax(0)


def distance(policy, wanted, reward, length):
    """KL(pi || pi*) of whole completions."""
    own = sequence_logprobs(policy.log_table(), all_sequences(reward.shape[0], length))
    return float((own.exp() * (own - wanted)).sum())


ALGORITHMS = {
    "rloo": {"kind": "rloo"},
    "grpo_reward": {"kind": "grpo", "scale": "none", "kl_in": "reward"},
    "grpo_k2": {"kind": "grpo", "scale": "none", "kl_estimator": "k2"},
    "grpo_k3": {"kind": "grpo", "scale": "none"},
    "ppo": {"kind": "ppo", "whiten": False, "epochs": 2, "minibatches": 2, "value_clip": 0.0},
    "ppo_whitened": {"kind": "ppo", "epochs": 2, "minibatches": 2},
}


def effective_beta(settings):
    in_loss = settings["kind"] == "grpo" and settings.get("kl_in") != "reward"
    return BETA * GROUP / (GROUP - 1) if in_loss else BETA


@pytest.mark.parametrize("name", ALGORITHMS)
def test_bandit(name):
    policy, reference, reward = problem(5, 1)
    settings = ALGORITHMS[name]
    wanted = optimum(reference, reward, 1, effective_beta(settings))
    assert distance(policy, wanted, reward, 1) > 0.1
    train(
        policy, reference, reward, 1, {**settings, "kl_coef": BETA},
        steps=120, count=128, group=GROUP, lr=0.3,
    )  # fmt: skip
    assert distance(policy, wanted, reward, 1) < GATE


@pytest.mark.parametrize("name", ["rloo", "grpo_k3", "ppo"])
def test_two_tokens(name):
    """A tiny Markov policy: the first token's worth is what the second makes of it."""
    policy, reference, reward = problem(3, 2)
    settings = ALGORITHMS[name]
    wanted = optimum(reference, reward, 2, effective_beta(settings))
    assert distance(policy, wanted, reward, 2) > 0.1
    train(
        policy, reference, reward, 2, {**settings, "kl_coef": BETA},
        steps=120, count=128, group=GROUP, lr=0.3,
    )  # fmt: skip
    assert distance(policy, wanted, reward, 2) < GATE


def test_k3_without_the_ratio_is_another_regulariser():
    """Its mean gradient is that of KL(ref || pi), whose optimum is pi = beta ref / (c - r)."""
    policy, reference, reward = problem(5, 1)
    ref = reference.log_table()[0].double().exp()
    beta = 0.2 * GROUP / (GROUP - 1)
    low, high = float(reward.max()), float(reward.max()) + beta
    for _ in range(80):  # c by bisection: the probabilities have to sum to 1
        middle = (low + high) / 2
        total = float((beta * ref / (middle - reward)).sum())
        low, high = (middle, high) if total > 1 else (low, middle)
    wanted = (beta * ref / (high - reward)).log()
    train(
        policy, reference, reward, 1,
        {"kind": "grpo", "scale": "none", "kl_coef": 0.2, "kl_unbiased": False},
        steps=120, count=128, group=GROUP, lr=0.3,
    )  # fmt: skip
    assert distance(policy, wanted, reward, 1) < GATE
    assert distance(policy, optimum(reference, reward, 1, beta), reward, 1) > 5 * GATE
