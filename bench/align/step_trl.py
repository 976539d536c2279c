"""TRL's side of speed.py, run in the peer's own environment.

    python step_trl.py JOB.json -> one JSON line

`steps` of GRPOTrainer with transformers' generation, or plain `transformers.generate`
(`generate`). Lengths are forced with min_new_tokens, as RLHF benchmarks do.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def now() -> tuple[float, float]:
    """(wall, CPU) seconds; the CPU's are those of all threads of this process."""
    return time.perf_counter(), time.process_time()


class Clock(TrainerCallback):
    """Seconds of every optimizer step, and what was logged."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.phases: dict[str, float] = {}

    def timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method with its seconds added to a phase."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = now()
            result = method(*args, **kwargs)
            self.add(name, started)
            return result

        return run

    def add(self, name: str, started: tuple[float, float]) -> None:
        """Wall and CPU seconds since then."""
        for kind, began, ended in zip(("", "cpu_"), started, now(), strict=True):
            self.phases[kind + name] = self.phases.get(kind + name, 0.0) + ended - began

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = now()
        self.phases.clear()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.add("step", self._started)
        for kind in ("", "cpu_"):
            train = self.phases[f"{kind}step"] - self.phases[f"{kind}experience"]
            self.phases[f"{kind}train"] = train
        self.steps.append(dict(self.phases))

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Keep the figures of the step."""
        if "loss" in logs:
            keys = ("loss", "grad_norm", "reward", "completions/mean_length")
            self.steps[-1] |= {key: float(logs[key]) for key in keys}


def load(job: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))


def steps(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Seconds of each step and its phases."""
    count, clock = len(job["prompts"]) * job["group"], Clock()

    def small(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(t < job["bound"] for t in ids) / len(ids) for ids in completion_ids]

    config = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=min(count, job["micro_rows"]),
        gradient_accumulation_steps=count // min(count, job["micro_rows"]),
        num_generations=job["group"], max_completion_length=job["new_tokens"],
        generation_kwargs={"min_new_tokens": job["new_tokens"]}, temperature=1.0, top_k=0,
        beta=job["kl"], loss_type="dapo", max_steps=job["steps"], learning_rate=job["lr"],
        lr_scheduler_type="constant", weight_decay=0.0, optim="adamw_torch_fused", use_cpu=True,
        bf16=False, gradient_checkpointing=False, shuffle_dataset=False, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    names = [str(i) for i in range(len(job["prompts"]))]
    trainer = GRPOTrainer(
        model=load(job), reward_funcs=small, args=config, callbacks=[clock],
        train_dataset=Dataset.from_dict({"prompt": names}),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )  # fmt: skip
    trainer._tokenize_prompts = lambda prompts: (
        [job["prompts"][int(p)] for p in prompts],
        None,
        {},
    )
    trainer._generate_single_turn = clock.timed("generate", trainer._generate_single_turn)
    trainer._generate_and_score_completions = clock.timed(
        "experience", trainer._generate_and_score_completions
    )
    trainer.train()
    for step in clock.steps:
        assert step["completions/mean_length"] == job["new_tokens"], step
    return {"steps": clock.steps}


@torch.no_grad()
def generate(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Seconds of `repeats` calls of plain generate on all prompts, each `group` times."""
    model, seconds, cpu = load(job).eval(), [], []
    prompts = torch.tensor([ids for ids in job["prompts"] for _ in range(job["group"])])
    for turn in range(1 + job["repeats"]):
        torch.manual_seed(turn)
        started = now()
        found = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, max_new_tokens=job["new_tokens"],
            min_new_tokens=job["new_tokens"], pad_token_id=0,
        )  # fmt: skip
        ended = now()
        seconds.append(ended[0] - started[0])
        cpu.append(ended[1] - started[1])
        assert found.shape[1] == prompts.shape[1] + job["new_tokens"]
    return {"seconds": seconds[1:], "cpu_seconds": cpu[1:]}


def main() -> int:
    """Run the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory() as folder:
        work = generate if job["what"] == "generate" else steps
        result = work(job, folder)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
