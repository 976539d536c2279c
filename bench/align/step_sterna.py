"""Sterna's side of speed.py, a process of its own.

    python step_sterna.py JOB.json -> one JSON line

`steps` of GRPO with the phases of each step, or one call of the rollout engine (`generate`).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sterna.align.build import build
from sterna.align.config import RlRecipe
from sterna.align.hybrid import Sampling
from sterna.align.reward import Sample


class Small:
    """The share of token ids below a bound: a reward that costs nothing and varies."""

    name = "small"

    def __init__(self, bound: int) -> None:
        self._bound = bound

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """One a sample."""
        return [float((s.rollout.completion < self._bound).mean()) for s in samples]


def recipe(job: dict[str, Any], folder: Path) -> RlRecipe:
    """The job as a recipe in `folder`."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": ids}) + "\n" for ids in job["prompts"]))
    size, is_ppo = len(job["prompts"][0]), job["algorithm"] == "ppo"
    reward = {"kind": "function", "path": "given.py:small"}  # build is given one
    if is_ppo:
        reward = {"kind": "model", "path": job["reward"]}
    return RlRecipe.model_validate({
        "model": {"path": job["model"], "dtype": job["dtype"]},
        "prompts": {"path": str(prompts), "max_tokens": size},
        "rollout": {
            "prompts_per_step": len(job["prompts"]), "group_size": job["group"],
            "max_tokens": job["new_tokens"], "ignore_eos": True, "weights": job["weights"],
        },
        "algorithm": {
            "kind": job["algorithm"], "micro_tokens": job["micro_tokens"], "kl_coef": job["kl"],
        },
        "rewards": [reward],
        "optim": {"lr": job["lr"], "beta2": 0.999},
        "critic": {"optim": {"lr": job["lr"], "beta2": 0.999}},
        "run": {"output": str(folder / "run"), "steps": job["steps"], "threads": job["threads"],
                "samples": 0},
        "checkpoint": {"every": 0},
    })  # fmt: skip


def now() -> tuple[float, float]:
    """(wall, CPU) seconds; the CPU's are those of all threads of this process."""
    return time.perf_counter(), time.process_time()


def steps(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds of each step and its phases."""
    found = []
    given = None if job["algorithm"] == "ppo" else [Small(job["bound"])]
    with build(recipe(job, folder), rewards=given) as trainer:
        trainer.start()
        while trainer.has_steps():
            marks = [now()]
            prompts = trainer.next_prompts()
            rollouts = trainer.generate(prompts)
            marks.append(now())
            rewards = trainer.reward(prompts, rollouts)
            experience = trainer.make_experience(prompts, rollouts, rewards)
            marks.append(now())
            trainer.learn(experience)
            marks.append(now())
            trainer.after_step(experience)
            assert {len(r.completion) for r in rollouts} == {job["new_tokens"]}
            keys = ("loss", "grad_norm", "reward", "sampling/sampling_logp_difference/max")
            found.append({**spent(marks), **{key: trainer.last[key] for key in keys}})
    return {"steps": found}


def spent(marks: list[tuple[float, float]]) -> dict[str, float]:
    """Wall and CPU seconds of the phases between the marks."""
    found = {}
    for i, kind in enumerate(("", "cpu_")):
        start, made, scored, learnt = (mark[i] for mark in marks)
        found |= {f"{kind}generate": made - start, f"{kind}experience": scored - start,
                  f"{kind}train": learnt - scored, f"{kind}step": learnt - start}  # fmt: skip
    return found


def generate(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds of `repeats` calls of the engine on the trainer's own weights."""
    seconds, cpu = [], []
    alone = {**job, "algorithm": "reinforce"}  # completions that are nobody's group
    with build(recipe(alone, folder), rewards=[Small(job["bound"])]) as trainer:
        sampling = Sampling(max_tokens=job["new_tokens"], ignore_eos=True)
        hybrid = trainer.parts.hybrid
        for turn in range(1 + job["repeats"]):
            started = now()
            seeds = [turn * 1000 + i for i in range(len(job["prompts"]))]
            rollouts = hybrid.generate(job["prompts"], job["group"], sampling, seeds)
            hybrid.sleep()
            ended = now()
            seconds.append(ended[0] - started[0])
            cpu.append(ended[1] - started[1])
            assert {len(r.completion) for r in rollouts} == {job["new_tokens"]}
    return {"seconds": seconds[1:], "cpu_seconds": cpu[1:]}


def main() -> int:
    """Run the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    with tempfile.TemporaryDirectory() as folder:
        work = generate if job["what"] == "generate" else steps
        result = work(job, Path(folder))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
