"""Policies and values as tables, run through the real learner: their optimum has a closed form.

State 0 is the start, state 1 + a stands after token a. The hidden vector of a row is the one-hot of
its state, so the head's weight is the table of logits (transposed).
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sterna.align.config import AlgorithmSection
from sterna.align.experience import Models, make_experience
from sterna.align.kl import KLController
from sterna.align.learner import Learner, Trained, values_of
from sterna.align.reward import Rewards
from sterna.align.rollout import Rollout
from sterna.align.score import completion_logprobs
from sterna.kernels.scores import Distribution
from sterna.model.batch import Batch
from sterna.train.config import OptimSection
from sterna.train.gradients import Gradients
from sterna.train.optim import AdamW

PROMPT = 0  # the token of every prompt; completions use 0 .. V - 1 as well


class Table(nn.Module):
    """A Markov policy over V tokens; also its critic's table where V is 1."""

    config = SimpleNamespace(logits_softcap=0.0)

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits.T.contiguous())  # [V, states]

    def hidden(self, batch: Batch) -> Tensor:
        """[T, states]."""
        state = torch.where(batch.positions == 0, 0, 1 + batch.tokens).long()
        return nn.functional.one_hot(state, self.table.shape[1]).float()

    def head_weight(self) -> Tensor:
        """The table."""
        return self.table

    def head_bias(self) -> None:
        """None."""

    def values(self, batch: Batch) -> Tensor:
        """[T]: of a table with one row."""
        return self.hidden(batch) @ self.table[0]

    def log_table(self) -> Tensor:
        """[states, V] log-probs, without a graph."""
        return self.table.detach().T.log_softmax(-1)


def all_sequences(size: int, length: int) -> list[tuple[int, ...]]:
    """Every completion."""
    return list(itertools.product(range(size), repeat=length))


def sequence_logprobs(log_table: Tensor, sequences: list[tuple[int, ...]]) -> Tensor:
    """[S] log-probs of whole completions, float64."""
    table = log_table.double()
    found = []
    for sequence in sequences:
        states = [0, *(1 + token for token in sequence[:-1])]
        found.append(table[states, list(sequence)].sum())
    return torch.stack(found)


def sample(log_table: Tensor, length: int, count: int, group: int, seed: int) -> list[Rollout]:
    """`count` completions in groups of `group`, with the table's log-probs."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.zeros(count, dtype=torch.int64)
    tokens, logprobs = [], []
    for _ in range(length):
        rows = log_table[state]
        token = torch.multinomial(rows.exp(), 1, generator=generator)[:, 0]
        tokens.append(token)
        logprobs.append(rows.gather(1, token[:, None])[:, 0])
        state = 1 + token
    completions = torch.stack(tokens, 1).to(torch.int32).numpy()
    said = torch.stack(logprobs, 1).float().numpy()
    prompt, mask = np.array([PROMPT], np.int32), np.ones(length, np.bool_)
    return [
        Rollout(i // group, i % group, prompt, completions[i], mask, said[i], 0, False)
        for i in range(count)
    ]


def train(
    policy: Table,
    reference: Table,
    reward: Tensor,
    length: int,
    settings: dict[str, Any],
    *,
    steps: int,
    count: int,
    group: int,
    lr: float,
) -> None:
    """`steps` updates of the policy towards reward [V, ..., V] of whole completions, lr to 0."""
    algorithm = AlgorithmSection.model_validate(settings)
    critic = Table(torch.zeros(policy.table.shape[1], 1)) if algorithm.kind == "ppo" else None
    learner = Learner(
        _trained(policy), _trained(critic) if critic is not None else None, algorithm,
        Distribution(), "none", 0, torch.device("cpu"),
    )  # fmt: skip
    kl = KLController(algorithm.kl_coef)
    models = Models(
        policy=lambda rollouts: scored(policy, rollouts),
        reference=lambda rollouts: scored(reference, rollouts),
        critic=None if critic is None else lambda rollouts: _values(critic, rollouts),
    )
    for step in range(steps):
        rollouts = sample(policy.log_table(), length, count, group, step)
        totals = torch.stack([reward[tuple(r.completion.tolist())] for r in rollouts]).double()
        rewards = Rewards(totals, {}, torch.ones(count, dtype=torch.bool))
        experience = make_experience(rollouts, rewards, models, algorithm, kl.coef)
        now = lr * (1 - step / steps)
        learner.learn(experience, step, kl.coef, now, 4 * now, length)


@torch.no_grad()
def scored(model: Table, rollouts: Any) -> Tensor:
    """[N] log-probs of the completions' tokens."""
    return completion_logprobs(model, rollouts)[0]


@torch.no_grad()
def _values(critic: Table, rollouts: Any) -> Tensor:
    return values_of(critic, rollouts, torch.device("cpu"))


def _trained(model: Table) -> Trained:
    optim = OptimSection(grad_clip=0.0)
    optimizer = AdamW([("table", model.table)], optim, 0)
    return Trained(model, optimizer, Gradients(model.parameters()), 0.0)
