"""The model of step 3 beside the one it began with: both answer the same held-out prompts.

    reward     mean of the weighted sum, and of each part; a gold metric among them
    win rate   share of prompts whose answer is worth more than the other's, ties count half
    KL         mean over answers of the sum of log pi - log pi_start over the answer's tokens

Each prompt's random numbers are the same for both, so equal models draw with equal answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sterna.align.adapted import is_adapter_folder, load_policy
from sterna.align.config import RlRecipe
from sterna.align.draw import make_draw, make_toolbox, speaks_chat
from sterna.align.hybrid import HybridEngine, Sampling
from sterna.align.pipeline.config import CompareSection
from sterna.align.prompts import Prompt, PromptStream, that_fit
from sterna.align.reward import Rewards, Sample
from sterna.align.rewards import make_rewards
from sterna.align.rollout import Rollout, completion_layout, rollout_logprobs
from sterna.align.rollout_engine import engine_config
from sterna.align.score import completion_logprobs, micro_batches
from sterna.align.tasks.base import Task
from sterna.align.tasks.table import make_task
from sterna.core.log import get_logger
from sterna.data.order import mix
from sterna.kernels.scores import Distribution
from sterna.model.decoder import Decoder
from sterna.model.hub import resolve_model
from sterna.model.load import load_config
from sterna.text.tokenizer import Tokenizer, load_tokenizer

_log = get_logger(__name__)
GOLD = "gold"
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Answers:
    """What one model answered, and what that is worth."""

    reward: float
    parts: dict[str, float]
    mean_length: float
    truncated: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """`win_metric` is "gold" where there is such a reward, else "reward"."""

    num_prompts: int
    before: Answers
    after: Answers
    win_metric: str
    win_rate: float
    kl: float | None  # None for greedy answers: it is an expectation over samples
    samples: tuple[tuple[str, str, str], ...]  # prompt, answer before, answer after


@dataclass(frozen=True, slots=True)
class _Run:
    """What both models are asked with."""

    recipe: RlRecipe
    settings: CompareSection
    tokenizer: Tokenizer
    task: Task | None
    prompts: list[Prompt]


def compare_models(recipe: RlRecipe, settings: CompareSection) -> Comparison | None:
    """None where no prompts are held out. Errors as `align_rl`."""
    if recipe.prompts.sources and not recipe.prompts.held_out:
        _log.warning("no prompts are held out (data.held_out), so the models are not compared")
        return None
    run = _open(recipe, settings)
    start, end = resolve_model(recipe.model.path), recipe.run.output / "model"
    old = _answers(run, start)
    new = _answers(run, end)
    rewards = make_rewards(recipe, (), run.task, run.tokenizer)
    before, after = (rewards(_samples(run, rollouts)) for rollouts in (old, new))
    metric = GOLD if GOLD in before.parts else "reward"
    return Comparison(
        num_prompts=len(run.prompts),
        before=_worth(old, before),
        after=_worth(new, after),
        win_metric=metric,
        win_rate=win_rate(_of(before, metric), _of(after, metric)),
        kl=_kl(run, new, start) if settings.temperature else None,
        samples=tuple(_sampled(run, old, new)),
    )


def win_rate(before: Tensor, after: Tensor) -> float:
    """Share of the values [B] `after` that are above `before`; ties count half."""
    return float(((after > before).double() + 0.5 * (after == before).double()).mean())


def _open(recipe: RlRecipe, settings: CompareSection) -> _Run:
    tokenizer = load_tokenizer(resolve_model(recipe.model.tokenizer or recipe.model.path))
    task = make_task(recipe.prompts.task, recipe.prompts.options) if recipe.prompts.task else None
    toolbox = make_toolbox(recipe)
    told = toolbox.schemas if toolbox and speaks_chat(recipe, tokenizer) else None
    context = load_config(resolve_model(recipe.model.path)).num_positions
    asked = that_fit(recipe.prompts, context, recipe.rollout.max_tokens)
    stream = PromptStream(asked, tokenizer, task, "eval", told)
    return _Run(recipe, settings, tokenizer, task, stream.take(settings.prompts))


def _answers(run: _Run, path: Path) -> list[Rollout]:
    """One completion of each prompt."""
    recipe, settings = run.recipe, run.settings
    hybrid = HybridEngine(_load(run, path), run.tokenizer, engine_config(recipe))
    draw = make_draw(recipe, hybrid, run.tokenizer, make_toolbox(recipe))
    rollout = recipe.rollout
    sampling = Sampling(
        max_tokens=rollout.max_tokens,
        temperature=settings.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop=rollout.stop,
    )
    seeds = [mix(recipe.run.seed, prompt.index, 23) for prompt in run.prompts]
    try:
        return draw(run.prompts, 1, sampling, seeds)
    finally:
        draw.close()
        hybrid.close()


def _load(run: _Run, path: Path) -> Decoder:
    device = torch.device(run.recipe.model.device)
    if is_adapter_folder(path):
        base = resolve_model(run.recipe.model.path)
        return load_policy(run.recipe, base, path, device).requires_grad_(False)
    plain = run.recipe.model_copy(update={"adapter": None})
    return load_policy(plain, path, None, device).requires_grad_(False)


def _samples(run: _Run, rollouts: Sequence[Rollout]) -> list[Sample]:
    decode = run.tokenizer.decode
    return [
        Sample(
            prompt=run.prompts[one.prompt_idx].text,
            completion=decode(one.completion.tolist()),
            row=run.prompts[one.prompt_idx].row,
            rollout=one,
        )
        for one in rollouts
    ]


def _of(rewards: Rewards, metric: str) -> Tensor:
    return rewards.parts[GOLD] if metric == GOLD else rewards.total


def _worth(rollouts: Sequence[Rollout], rewards: Rewards) -> Answers:
    lengths = [len(one.completion) for one in rollouts]
    return Answers(
        reward=float(rewards.total.mean()),
        parts={name: float(values.mean()) for name, values in rewards.parts.items()},
        mean_length=sum(lengths) / len(lengths),
        truncated=sum(one.is_truncated for one in rollouts) / len(rollouts),
    )


@torch.no_grad()
def _kl(run: _Run, rollouts: Sequence[Rollout], start: Path) -> float:
    rollout, device = run.recipe.rollout, torch.device(run.recipe.model.device)
    distribution = Distribution(run.settings.temperature, rollout.top_k, rollout.top_p)
    model, size = _load(run, start), run.recipe.algorithm.micro_tokens
    found = [
        completion_logprobs(model, part, distribution, device=device)[0].cpu()
        for part in micro_batches(rollouts, size)
    ]
    reference = torch.cat(found)
    layout = completion_layout(rollouts)
    return float(layout.sums(rollout_logprobs(rollouts) - reference).mean())


def _sampled(
    run: _Run, old: Sequence[Rollout], new: Sequence[Rollout]
) -> list[tuple[str, str, str]]:
    decode = run.tokenizer.decode
    return [
        (
            run.prompts[one.prompt_idx].text,
            decode(one.completion.tolist()),
            decode(other.completion.tolist()),
        )
        for one, other in zip(old[:_SHOWN], new[:_SHOWN], strict=True)
    ]
