"""Measures a policy while it learns: greedy and sampled, on held-out prompts and trained ones.

A measurement is a line of probe.jsonl in the run's folder:

    {"step": 20, "part": "eval", "greedy/reward": ..., "sampled/reward": ..., "pass@1": ...,
     "pass@8": ..., "eos_ratio": ..., "length": ..., "cpu_minutes": ...}

`cpu_minutes` are those of learning so far, measuring left out, over all processes that a run was
interrupted into.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from sterna.align.experience import Experience
from sterna.align.hybrid import Sampling
from sterna.align.prompts import Prompt, PromptStream
from sterna.align.reward import Rewards, Sample
from sterna.align.rlhooks import RlHook
from sterna.align.rltrainer import RlTrainer
from sterna.align.tasks.base import Part
from sterna.align.tasks.table import make_task
from sterna.core.rundir import write_atomic
from sterna.data.order import mix
from sterna.train.metrics import read_metrics

FILE = "probe.jsonl"
# More figures of the sampled completions, by name.
Extra = Callable[[Sequence[Sample]], Mapping[str, float]]
_SOLVED = 1.0 - 1e-6


class Probe(RlHook):
    """Every `every` steps, before the first and after the last."""

    def __init__(
        self,
        every: int,
        prompts: int,
        samples: int,
        extra: Extra | None = None,
        has_trained: bool = False,
        has_greedy: bool = True,
    ) -> None:
        """`samples` completions of each of `prompts` prompts, and a greedy one with `has_greedy`.

        `has_trained`: at the start and the end also those of the training part.
        """
        self._every, self._prompts, self._samples = every, prompts, samples
        self._extra = extra
        self._has_trained, self._has_greedy = has_trained, has_greedy
        self._minutes = 0.0
        self._since = 0.0

    def on_start(self, trainer: RlTrainer) -> None:
        """Drop what a killed run measured after its checkpoint; measure the start."""
        step = trainer.counters.step
        path = _path(trainer)
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._minutes = max((line["cpu_minutes"] for line in kept), default=0.0)
        self._since = time.process_time()
        if not kept:
            self._measure(trainer, step)

    def after_step(
        self, trainer: RlTrainer, step: int, figures: Mapping[str, float], experience: Experience
    ) -> None:
        """Measure when it is time."""
        if step % self._every == 0 or step == trainer.recipe.run.steps:
            self._measure(trainer, step)

    def _measure(self, trainer: RlTrainer, step: int) -> None:
        self._minutes += (time.process_time() - self._since) / 60
        is_edge = step in (0, trainer.recipe.run.steps)
        parts: tuple[Part, ...] = ("eval", "train") if self._has_trained and is_edge else ("eval",)
        with _path(trainer).open("a") as file:
            for part in parts:
                found = self._part(trainer, part)
                line = {"step": step, "part": part, **found, "cpu_minutes": self._minutes}
                file.write(json.dumps({k: _short(v) for k, v in line.items()}) + "\n")
        self._since = time.process_time()

    def _part(self, trainer: RlTrainer, part: Part) -> dict[str, float]:
        recipe = trainer.recipe
        task = make_task(recipe.prompts.task, recipe.prompts.options)
        stream = PromptStream(recipe.prompts, trainer.parts.tokenizer, task, part)
        prompts = stream.take(self._prompts)
        samples, rewards = _drawn(trainer, prompts, self._samples, recipe.rollout.temperature)
        return {
            **{f"sampled/{name}": value for name, value in _means(rewards).items()},
            **_passed(rewards.total, self._samples),
            "eos_ratio": 1 - sum(s.rollout.is_truncated for s in samples) / len(samples),
            "length": sum(len(s.rollout.completion) for s in samples) / len(samples),
            **(self._extra(samples) if self._extra else {}),
            **(self._greedy(trainer, prompts) if self._has_greedy else {}),
        }

    def _greedy(self, trainer: RlTrainer, prompts: Sequence[Prompt]) -> dict[str, float]:
        samples, rewards = _drawn(trainer, prompts, 1, 0.0)
        found = {
            **_means(rewards),
            "solved": float((rewards.total >= _SOLVED).double().mean()),
            **(self._extra(samples) if self._extra else {}),
        }
        return {f"greedy/{name}": value for name, value in found.items()}


def _path(trainer: RlTrainer) -> Path:
    return trainer.recipe.run.output / FILE


def _drawn(
    trainer: RlTrainer, prompts: Sequence[Prompt], count: int, temperature: float
) -> tuple[list[Sample], Rewards]:
    """`count` completions of each prompt and what they are worth."""
    parts, rollout = trainer.parts, trainer.recipe.rollout
    sampling = Sampling(max_tokens=rollout.max_tokens, temperature=temperature, stop=rollout.stop)
    seeds = [mix(trainer.recipe.run.seed, prompt.index, 11) for prompt in prompts]
    tokens = [prompt.tokens.tolist() for prompt in prompts]
    samples = trainer.samples(prompts, parts.hybrid.generate(tokens, count, sampling, seeds))
    parts.hybrid.sleep()
    return samples, parts.rewards(samples)


def _means(rewards: Rewards) -> dict[str, float]:
    parts = {name: float(values.mean()) for name, values in rewards.parts.items()}
    return {"reward": float(rewards.total.mean()), **parts}


def _passed(totals: torch.Tensor, samples: int) -> dict[str, float]:
    """Share of completions with the full reward, and of prompts with one such among `samples`."""
    solved = (totals >= _SOLVED).view(-1, samples)
    return {
        "pass@1": float(solved.double().mean()),
        f"pass@{samples}": float(solved.any(1).double().mean()),
    }


def _short(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value
