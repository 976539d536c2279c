"""Writes ppo.json: rewards, GAE and losses of the last TRL whose PPO is callable in parts (0.11.4).

Run once with a Python that has that TRL and a transformers of its time (4.45); the tests need only
the file:

    PYTHON_WITH_TRL_0_11 tests/golden/make_ppo_golden.py

Its methods run unbound on a stand-in that has the settings they read, in float64.
"""

from __future__ import annotations

import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

FILE = Path(__file__).with_name("ppo.json")
LENGTHS = [4, 2, 5, 3]
SCORES = [1.5, -0.75, 0.25, 2.0]
SETTINGS = {
    "plain": {"gamma": 1.0, "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.2, "kl": 0.05},
    "discounted": {"gamma": 0.97, "lam": 0.8, "cliprange": 0.1, "cliprange_value": 0.4, "kl": 0.2},
}


def without_datasets() -> None:
    """TRL imports names of `datasets` only to check types; any version will do."""
    module: Any = types.ModuleType("datasets")
    module.__spec__ = ModuleSpec("datasets", None)
    for name in ("Dataset", "DatasetDict", "IterableDataset"):
        setattr(module, name, type(name, (), {}))
    sys.modules["datasets"] = module


def tensors() -> dict[str, torch.Tensor]:
    """[B, T] waves: log-probs new, old and of the reference, values new and old; and the mask."""
    shape = (len(LENGTHS), max(LENGTHS))
    number = torch.arange(shape[0] * shape[1], dtype=torch.float64).reshape(shape)
    new = -1.0 - torch.sin(number * 1.3) * 0.8
    values = torch.cos(number * 0.7) * 0.9
    return {
        "new": new, "old": new + torch.cos(number * 2.1) * 0.3,
        "ref": new + torch.sin(number * 0.9) * 0.5,
        "old_values": values, "new_values": values + torch.sin(number * 1.9) * 0.5,
        "mask": torch.tensor([[float(t < n) for t in range(shape[1])] for n in LENGTHS]).double(),
    }  # fmt: skip


def ppo(trainer: Any, settings: dict[str, float]) -> dict[str, Any]:
    given = tensors()
    mask = given["mask"]
    config = SimpleNamespace(
        gamma=settings["gamma"], lam=settings["lam"], cliprange=settings["cliprange"],
        cliprange_value=settings["cliprange_value"], vf_coef=1.0, kl_penalty="kl",
        whiten_rewards=False, ratio_threshold=1e9,
    )  # fmt: skip
    fake = SimpleNamespace(config=config, kl_ctl=SimpleNamespace(value=settings["kl"]))
    fake._kl_penalty = lambda *x: trainer._kl_penalty(fake, *x)
    scores = torch.tensor(SCORES, dtype=torch.float64)
    rewards, _, _ = trainer.compute_rewards(fake, scores, given["old"], given["ref"], mask)
    _, advantages, returns = trainer.compute_advantages(fake, given["old_values"], rewards, mask)
    new, values = given["new"].requires_grad_(), given["new_values"].requires_grad_()
    policy, value, stats = trainer.loss(
        fake, given["old"], given["old_values"], torch.zeros(*mask.shape, 2).double(), values,
        new, mask, advantages, returns,
    )  # fmt: skip
    (d_policy,) = torch.autograd.grad(policy, new, retain_graph=True)
    (d_value,) = torch.autograd.grad(value, values)
    kept = mask.bool()
    return {
        **settings, "rewards": rewards[kept].tolist(), "advantages": advantages[kept].tolist(),
        "returns": returns[kept].tolist(), "policy_loss": policy.item(), "value_loss": value.item(),
        "policy_grad": d_policy[kept].tolist(), "value_grad": d_value[kept].tolist(),
        "policy_clipped": float(stats["policy/clipfrac"]),
        "value_clipped": float(stats["val/clipfrac"]),
    }  # fmt: skip


def main() -> None:
    without_datasets()
    import trl
    from trl.trainer.ppo_trainer import PPOTrainer

    given = tensors()
    kept = given.pop("mask").bool()
    found = {
        "trl": trl.__version__, "lengths": LENGTHS, "scores": SCORES,
        "tokens": {name: value[kept].tolist() for name, value in given.items()},
        "cases": {name: ppo(PPOTrainer, settings) for name, settings in SETTINGS.items()},
    }  # fmt: skip
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
