"""The last TRL with a whole PPO trainer (0.11.4, PPOv2Trainer) for speed.py, in its environment.

    python step_trl_ppo.py JOB.json -> one JSON line

Policy, reference, value and reward model of one size, one epoch, one update a step. The prompts of
a group are rows of their own, as that trainer has them. Experience is everything before the first
forward with a graph: generation, log-probs, values, rewards, advantages.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.trainer import ppov2_trainer
from trl.trainer.ppov2_trainer import PPOv2Config, PPOv2Trainer


class Clock(TrainerCallback):
    """(wall, CPU) seconds at the marks of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._marks: dict[str, tuple[float, float]] = {}
        self._generate = ppov2_trainer.batch_generation

    def generate(self, *args: Any) -> Any:
        """TRL's generation between two marks; its beginning is the step's."""
        self.mark("begin")
        found = self._generate(*args)
        self.mark("made")
        assert found[0].shape[1] == args[1].shape[1] + args[4].max_new_tokens
        return found

    def permutation(self, count: int) -> Any:
        """What the trainer asks for first when it begins to train."""
        self.mark("scored")
        return np.random.permutation(count)

    def mark(self, name: str) -> None:
        """Now, the CPU's seconds those of all threads."""
        self._marks[name] = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The phases of a step."""
        self.mark("end")
        marks, step = self._marks, {}
        for i, kind in enumerate(("", "cpu_")):
            begin, made, scored, end = (marks[n][i] for n in ("begin", "made", "scored", "end"))
            step |= {f"{kind}generate": made - begin, f"{kind}experience": scored - begin,
                     f"{kind}train": end - scored, f"{kind}step": end - begin}  # fmt: skip
        self.steps.append(step)


def steps(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Seconds of each step and its phases."""
    dtype, size = getattr(torch, job["dtype"]), len(job["prompts"]) * job["group"]
    config = PPOv2Config(
        output_dir=folder, per_device_train_batch_size=min(size, job["micro_rows"]),
        gradient_accumulation_steps=size // min(size, job["micro_rows"]), num_mini_batches=1,
        num_ppo_epochs=1, total_episodes=size * job["steps"], response_length=job["new_tokens"],
        local_rollout_forward_batch_size=min(size, job["micro_rows"]), temperature=1.0,
        kl_coef=job["kl"], learning_rate=job["lr"], lr_scheduler_type="constant", weight_decay=0.0,
        optim="adamw_torch_fused", use_cpu=True, num_sample_generations=0, save_strategy="no",
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    words = Path(job["model"]) / "tokenizer.json"  # its config is of a later transformers
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(words), pad_token="<|im_end|>", eos_token="<|endoftext|>"
    )
    saved = json.loads((Path(job["model"]) / "config.json").read_text())
    theta = saved.get("rope_theta") or saved["rope_parameters"]["rope_theta"]  # as today's spell it
    options = {"torch_dtype": dtype, "rope_theta": theta}
    load = partial(AutoModelForCausalLM.from_pretrained, job["model"], **options)
    value = partial(
        AutoModelForSequenceClassification.from_pretrained, job["reward"], num_labels=1, **options
    )
    rows = [ids for ids in job["prompts"] for _ in range(job["group"])]
    data, clock = Dataset.from_dict({"input_ids": rows}), Clock()
    ppov2_trainer.batch_generation = clock.generate
    ppov2_trainer.np = SimpleNamespace(random=SimpleNamespace(permutation=clock.permutation))
    trainer = PPOv2Trainer(
        config=config, tokenizer=tokenizer, train_dataset=data, eval_dataset=data,
        policy=load(), ref_policy=load(), value_model=value(), reward_model=value(),
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    return {"steps": clock.steps}


def main() -> int:
    """Run the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory() as folder:
        result = steps(job, folder)
    print("\n" + json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
