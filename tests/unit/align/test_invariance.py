"""A step's loss and gradients do not depend on how its completions are cut, ordered or spread.

float32: the loss to 1e-6, gradients to 1e-5 of their norm; one-sided drift would show in the mean
of the differences, which is held to 1e-7 of the largest gradient.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.unit.align.runs import tiny

from sterna.align.config import AlgorithmSection
from sterna.align.experience import Models, make_experience
from sterna.align.learner import Learner, Trained, values_of
from sterna.align.reward import Rewards
from sterna.align.rollout import Rollout
from sterna.align.score import completion_logprobs
from sterna.kernels.load import load_kernels
from sterna.kernels.scores import Distribution
from sterna.model.load import load_model
from sterna.model.value import load_value_model
from sterna.train.config import OptimSection
from sterna.train.gradients import Gradients
from sterna.train.optim import AdamW
from sterna.train.parts import trained

SHAPES = [(3, 9), (3, 2), (20, 1), (20, 14), (7, 30), (7, 5)]  # prompt, completion; groups of 2
SETTINGS = {
    "grpo": {"kind": "grpo", "kl_coef": 0.1},
    "grpo_sequence": {"kind": "grpo", "aggregate": "sequence", "ratio": "sequence"},
    "dr_grpo": {"kind": "grpo", "aggregate": "fixed", "scale": "none", "entropy_coef": 0.01},
    "ppo": {"kind": "ppo", "kl_coef": 0.1},
}


class Kept(Trained):
    """Keeps the gradients instead of using them."""

    def update(self, lr, what, ranks=1):
        of = self.gradients.of
        found = [of(w).flatten().clone() for w in self.model.parameters() if of(w) is not None]
        self.model.kept = torch.cat(found)
        return float(self.model.kept.norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    load_kernels()
    torch.set_num_threads(1)
    return tiny.write_model(tmp_path_factory.mktemp("invariance"))


def kept(model):
    return Kept(model, AdamW(trained(model), OptimSection(), 0), Gradients(model.parameters()), 0.0)


def problem(folder, settings):
    """(learner, experience): rollouts that another policy drew, some tokens not trained."""
    generator = np.random.default_rng(0)
    rollouts = []
    for i, (asked, size) in enumerate(SHAPES):
        mask = np.ones(size, np.bool_)
        mask[1 : size // 3] = False
        rollouts.append(
            Rollout(
                i // 2,
                i % 2,
                generator.integers(0, 250, asked).astype(np.int32),
                generator.integers(0, 250, size).astype(np.int32),
                mask,
                (-5.6 + 0.2 * generator.standard_normal(size)).astype(np.float32),
                0,
                i == 1,
            )
        )
    model = load_model(folder, "float32").decoder
    made = AlgorithmSection.model_validate(settings)
    critic = load_value_model(folder, "float32", "cpu") if made.kind == "ppo" else None
    with torch.no_grad():
        ref = completion_logprobs(model, rollouts)[0]
        values = None if critic is None else values_of(critic, rollouts, torch.device("cpu"))
    ref = ref + 0.1 * torch.from_numpy(generator.standard_normal(len(ref))).float()
    models = Models(None, lambda _: ref, None if values is None else lambda _: values)
    totals = torch.from_numpy(generator.standard_normal(len(SHAPES)))
    rewards = Rewards(totals, {}, torch.ones(len(SHAPES), dtype=torch.bool))
    experience = make_experience(rollouts, rewards, models, made, made.kl_coef)
    learner = Learner(
        kept(model), None if critic is None else kept(critic), made, Distribution(), "none", 0,
        torch.device("cpu"),
    )  # fmt: skip
    return learner, experience


def learnt(learner, experience):
    """(figures, gradients of the policy, of the critic)."""
    kl = learner._settings.kl_coef
    figures = learner.learn(experience, 0, kl, 0.0, 0.0, 32)
    critic = None if learner.critic is None else learner.critic.model.kept
    return figures, learner.policy.model.kept, critic


def assert_same(one, other):
    for name, value in one[0].items():
        if "clip_ratio" not in name:
            assert other[0][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert abs(one[0]["loss"] - other[0]["loss"]) < 1e-6
    for a, b in zip(one[1:], other[1:], strict=True):
        if a is not None:
            assert (a - b).norm() < 1e-5 * a.norm()
            assert abs((a - b).double().mean()) < 1e-7 * a.abs().max()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("micro_tokens", [1, 30, 70])
def test_micro_batches_and_packing(folder, name, micro_tokens):
    """Each completion alone, a few side by side, all in one batch."""
    whole = learnt(*problem(folder, SETTINGS[name]))
    cut = learnt(*problem(folder, {**SETTINGS[name], "micro_tokens": micro_tokens}))
    assert_same(whole, cut)


@pytest.mark.parametrize("name", SETTINGS)
def test_order(folder, name):
    """The same completions the other way round."""
    learner, experience = problem(folder, SETTINGS[name])
    assert_same(learnt(learner, experience), learnt(learner, turned(experience)))


def turned(experience):
    starts = experience.layout.starts.tolist()
    order = range(len(SHAPES))[::-1]
    rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in order])
    lengths = [starts[i + 1] - starts[i] for i in order]
    layout = replace(
        experience.layout, starts=torch.tensor([0, *np.cumsum(lengths)]),
        mask=experience.layout.mask[rows],
    )  # fmt: skip
    moved = {
        name: None if getattr(experience, name) is None else getattr(experience, name)[rows]
        for name in (
            "rollout_logprobs", "old_logprobs", "ref_logprobs", "values", "returns", "advantages",
        )
    }  # fmt: skip
    return replace(
        experience, rollouts=tuple(experience.rollouts[i] for i in order), layout=layout, **moved
    )


def rank(index, folder, name, port, queue):
    """Half of the micro-batches, weighted as parts of the whole; the sum is the step's gradient."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=index, world_size=2)
    load_kernels()
    torch.set_num_threads(1)
    learner, experience = problem(folder, {**SETTINGS[name], "micro_tokens": 1})
    whole = learner._policy_step

    def half(parts, micros, kl_coef, lr):
        return whole(parts[index::2], micros, kl_coef, lr)

    learner._policy_step = half
    figures, grads, _ = learnt(learner, experience)
    loss = torch.tensor([figures["loss"]])
    for tensor in (grads, loss):
        dist.all_reduce(tensor)
    if index == 0:
        queue.put((grads.numpy(), float(loss)))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_add_up(folder, unused_port):
    """Data parallel over gloo: the weights of the whole batch make the ranks' sums its gradient."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=rank, args=(i, folder, "grpo", unused_port, queue)) for i in range(2)
    ]
    for process in processes:
        process.start()
    grads, loss = queue.get()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    figures, wanted, _ = learnt(*problem(folder, SETTINGS["grpo"]))
    assert abs(loss - figures["loss"]) < 1e-6
    assert (torch.from_numpy(grads) - wanted).norm() < 1e-5 * wanted.norm()


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
