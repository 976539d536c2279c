"""Writes rl.json: two optimizer steps of TRL's own GRPO and RLOO trainers on given completions.

Run once with a Python that has TRL (1.16.0 wrote the stored file); the tests need only the file:

    PYTHON_WITH_TRL tests/golden/make_rl_golden.py

Nothing of TRL is replaced but the sampling: its `rollout_func` returns the completions below, its
reward function the numbers below. Rewards, advantages, reference, losses, gradients and AdamW are
TRL's. With `num_iterations = 2` the second step trains on the same completions with other weights.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from make_align_golden import CONFIG, tiny
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

FILE = Path(__file__).with_name("rl.json")
PROMPTS = [[5, 9, 11], [2, 3, 12, 14]]
COMPLETIONS = [  # three of each prompt; 1 is EOS
    [[7, 8, 1], [20, 1], [30, 31, 32, 33, 34, 35]],
    [[6, 1], [21, 22, 23, 1], [9, 40, 1]],
]
REWARDS = [[1.0, -0.5, 0.25], [2.0, 0.0, 3.5]]
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 6, "num_generations": 3, "num_iterations": 2, "max_steps": 2,
    "max_completion_length": 6, "learning_rate": 0.01, "lr_scheduler_type": "constant",
    "weight_decay": 0.0, "max_grad_norm": 1.0, "use_cpu": True, "bf16": False,
    "gradient_checkpointing": False, "shuffle_dataset": False, "logging_steps": 1,
    "save_strategy": "no", "report_to": [], "disable_tqdm": True, "optim": "adamw_torch",
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"loss_type": "grpo", "beta": 0.04, "scale_rewards": "group"}),
    "grpo_biased": ("grpo", {"loss_type": "grpo", "beta": 0.04, "scale_rewards": "group",
                             "use_bias_correction_kl": False}),
    "dapo": ("grpo", {"loss_type": "dapo", "beta": 0.0, "scale_rewards": "batch",
                      "epsilon_high": 0.28}),
    "dr_grpo": ("grpo", {"loss_type": "dr_grpo", "beta": 0.04, "scale_rewards": "none"}),
    "gspo": ("grpo", {"loss_type": "grpo", "beta": 0.0, "scale_rewards": "group",
                      "importance_sampling_level": "sequence", "epsilon": 0.05}),
    "cispo": ("grpo", {"loss_type": "cispo", "beta": 0.0, "scale_rewards": "group",
                       "epsilon_high": 1.2}),
    # One step: with other weights its ratio is that of the whole completion, which is not ours.
    "rloo": ("rloo", {"beta": 0.05, "num_iterations": 1, "max_steps": 1}),
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token; only decoding is asked of it."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(48)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", pad_token="w0")


def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """The stored completions, in the order TRL asks for them."""
    seen = dict.fromkeys(prompts, 0)
    found: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": None}
    for prompt in prompts:
        group = int(prompt)
        found["prompt_ids"].append(PROMPTS[group])
        found["completion_ids"].append(COMPLETIONS[group][seen[prompt]])
        seen[prompt] += 1
    return found


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """By completion."""
    worth = {
        tuple(ids): value
        for group, values in zip(COMPLETIONS, REWARDS, strict=True)
        for ids, value in zip(group, values, strict=True)
    }
    return [worth[tuple(ids)] for ids in completion_ids]


def steps(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        make, trainer_of = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[
            kind
        ]
        own = {"rollout_func": rollouts} if kind == "grpo" else {}
        tiny(0.1).save_pretrained(folder)
        model = tiny(0.0)
        model.config._name_or_path = folder
        trainer: Any = trainer_of(
            model=model, reward_funcs=reward,
            args=make(output_dir=folder, **{**COMMON, **settings}),
            train_dataset=Dataset.from_dict({"prompt": ["0", "1"]}),
            processing_class=tokenizer(), **own,
        )  # fmt: skip
        if kind == "rloo":  # has no rollout_func: the two calls that sample
            trainer._tokenize_prompts = lambda prompts: (
                [PROMPTS[int(p)] for p in prompts], None, {},
            )  # fmt: skip
            trainer._generate_single_turn = lambda ids, *_: rollouts(
                [str(PROMPTS.index(p)) for p in ids], None
            )["completion_ids"]
        trainer.train()
        logs = [line for line in trainer.state.log_history if "loss" in line]
        keys = ("loss", "grad_norm", "kl", "reward", "clip_ratio/low_mean", "clip_ratio/high_mean")
        moved = torch.cat([p.detach().flatten() for p in model.parameters()])
        return {
            "kind": kind, "settings": settings,
            "advantages": list(trainer._logs["advantages"])[:6],
            "steps": [{key: line[key] for key in keys if key in line} for line in logs],
            "weights_sum": float(moved.double().sum()),
            "weights_square": float(moved.double().square().sum()),
        }  # fmt: skip


def main() -> None:
    found = {
        "trl": trl.__version__, "config": CONFIG, "prompts": PROMPTS, "completions": COMPLETIONS,
        "rewards": REWARDS, "lr": COMMON["learning_rate"], "max_length": 6, "policy_turn": 0.0,
        "reference_turn": 0.1,
        "cases": {name: steps(*case) for name, case in CASES.items()},
    }  # fmt: skip
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
