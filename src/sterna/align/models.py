"""Who is asked about a step's rollouts: policy, reference, critic, each by micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sterna.align.adapted import without_adapter
from sterna.align.config import RlRecipe
from sterna.align.engines import RolloutEngine
from sterna.align.experience import Models
from sterna.align.learner import Learner, Trained, values_of
from sterna.align.memory.away import Frozen
from sterna.align.rollout import Rollout
from sterna.align.score import completion_logprobs, micro_batches, shares_prompts
from sterna.kernels.scores import Distribution
from sterna.model.decoder import Decoder
from sterna.model.hub import resolve_model
from sterna.model.load import load_model


def make_models(
    recipe: RlRecipe,
    policy: Decoder,
    hybrid: RolloutEngine,
    learner: Learner,
    base: Path,
    device: torch.device,
    teacher: Frozen | None,
) -> Models:
    """Who is asked about rollouts; the trainer is not where the engine has said the same bits."""
    scored = partial(logprobs_of, recipe=recipe, device=device)
    reference = None
    wants = bool(recipe.algorithm.kl_coef or recipe.algorithm.kl_target)
    if wants and recipe.adapter is not None and not recipe.reference:
        reference = without_adapter(policy, partial(scored, policy))
    elif wants:
        path = resolve_model(recipe.reference) if recipe.reference else base
        loaded = load_model(path, recipe.model.dtype, device).decoder
        frozen = Frozen.of(loaded, recipe, recipe.memory.reference)
        reference = frozen.asked(partial(scored, frozen.model))
    elif teacher is not None and recipe.distill.loss == "sampled":
        reference = teacher.asked(partial(scored, teacher.model))
    critic = learner.critic
    return Models(
        policy=None if is_exact(recipe, hybrid) else partial(scored, policy),
        reference=reference,
        critic=None if critic is None else partial(_values, learner, critic, recipe, device),
    )


def is_exact(recipe: RlRecipe, hybrid: RolloutEngine) -> bool:
    """Whether a rollout's log-probs are the trainer's bits: its present weights, on the CPU."""
    return hybrid.is_exact and recipe.model.device == "cpu" and not recipe.rollout.staleness


def distribution_of(recipe: RlRecipe) -> Distribution:
    """What completions are drawn from."""
    rollout = recipe.rollout
    return Distribution(rollout.temperature, rollout.top_k, rollout.top_p)


@torch.no_grad()
def logprobs_of(
    model: Decoder, rollouts: Sequence[Rollout], *, recipe: RlRecipe, device: torch.device
) -> Tensor:
    """[N]: log-probs of the completions' tokens under `model`, without a graph."""
    distribution, size = distribution_of(recipe), recipe.algorithm.micro_tokens
    parts = micro_batches(rollouts, size, shares_prompts(model))
    found = [completion_logprobs(model, p, distribution, device=device)[0].cpu() for p in parts]
    return torch.cat(found) if found else torch.zeros(0)


def _values(
    learner: Learner,
    critic: Trained,
    recipe: RlRecipe,
    device: torch.device,
    rollouts: Sequence[Rollout],
) -> Tensor:
    """[N]. With the graph of its update where the step has one, of one micro-batch, on one rank:
    the critic that is trained is the one that was asked, so its forward serves both.
    """
    settings = recipe.algorithm
    parts = micro_batches(rollouts, settings.micro_tokens, shares_prompts(critic.model))
    is_single = settings.epochs == settings.minibatches == len(parts) == learner.axis.size == 1
    with torch.set_grad_enabled(is_single):
        found = [values_of(critic.model, part, device).cpu() for part in parts]
    return torch.cat(found) if found else torch.zeros(0)
