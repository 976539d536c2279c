"""Whether a run fits into its budget, which placement makes it fit, or what is lacking.

The placement is what changes no result but by the order of a sum: tokens of a micro-batch, the KV
cache (fewer sequences at a time), where frozen models and a save's copy are. All of them are tried
by what they cost (`_cost`): the cheapest that fits is taken. What changes results, such as the
optimizer's states, is only proposed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sterna.align.config import RlRecipe
from sterna.align.memory.held import Held, Locate, held_models, located
from sterna.align.memory.phases import Needs, needs_of
from sterna.align.rollout_engine import planned_weights
from sterna.core.errors import ConfigError, SternaError
from sterna.train.adapter_config import AdapterConfig
from sterna.train.plan import GIB, MEMORY_ERROR

Change = dict[str, Any]  # keys of a recipe and their new values
_FEWEST_TOKENS = 512  # below it a micro-batch is mostly overhead


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that a run may take: of its device, of the host (with a GPU), of the disk."""

    device: float
    host: float = 0.0
    disk: float = math.inf


@dataclass(frozen=True, slots=True)
class RlPlan:
    """A recipe with its placement and what that takes. `reasons`: empty where it fits."""

    recipe: RlRecipe
    needs: Needs
    changes: Change
    lacking: tuple[str, ...] = ()  # of the recipe as it was given
    reasons: tuple[str, ...] = ()
    proposals: tuple[tuple[Change, float], ...] = ()  # with the peak of each, if nothing fits

    @property
    def peak(self) -> float:
        """Bytes of the device with the margin."""
        return self.needs.peak * (1 + MEMORY_ERROR)


def plan_rl(
    recipe: RlRecipe, budget: Budget, locate: Locate = located, fixed: Sequence[str] = ()
) -> RlPlan:
    """The cheapest placement that fits, else the most frugal one and what that lacks.

    `fixed`: keys that stay as they are. ConfigError for tiers without a model to put there; errors
    of the loaders for unknown models.
    """
    models = held_models(recipe, locate)
    check_tiers(recipe, models)
    asked = _planned(recipe, models, {})
    lacking = lacks(asked.needs, budget)
    if not lacking:
        return asked
    found = _cheapest(recipe, models, budget, fixed)
    if found is not None:
        return replace(found, recipe=changed_recipe(recipe, found.changes), lacking=lacking)
    nearest = _most_frugal(recipe, models, fixed)
    tried = (_tried(recipe, change, budget, locate) for change in _proposals(recipe))
    return replace(
        nearest, lacking=lacking, reasons=lacks(nearest.needs, budget),
        proposals=tuple(found for found in tried if found is not None),
    )  # fmt: skip


def _cheapest(
    recipe: RlRecipe, models: Sequence[Held], budget: Budget, fixed: Sequence[str] = ()
) -> RlPlan | None:
    """The cheapest placement that fits."""
    if _most_frugal(recipe, models, fixed).peak > budget.device:
        return None  # nor does any other
    for change in sorted(placements(recipe, models, fixed), key=lambda one: _cost(recipe, one)):
        found = _planned(recipe, models, change)
        if not lacks(found.needs, budget):
            return found
    return None


def _most_frugal(recipe: RlRecipe, models: Sequence[Held], fixed: Sequence[str]) -> RlPlan:
    """Every choice as small as it gets, whatever it costs."""
    open_ = choices(recipe, models).items()
    least = {key: values[-1] for key, values in open_ if values and key not in fixed}
    return _planned(recipe, models, least)


def lacks(needs: Needs, budget: Budget) -> tuple[str, ...]:
    """What there is too little of, with the margin; empty when it fits."""
    found = []
    peak = needs.peak * (1 + MEMORY_ERROR)
    if peak > budget.device:
        parts = {**needs.held, **needs.workers, **needs.phases[needs.peak_phase]}
        name = max(parts, key=lambda part: parts[part])
        found.append(
            f"{peak / GIB:.2f} GiB in the phase {needs.peak_phase}, {budget.device / GIB:.2f} are "
            f"there; the largest part is {name} ({parts[name] / GIB:.2f} GiB)"
        )
    for what, parts, room in (("host", needs.host, budget.host), ("disk", needs.disk, budget.disk)):
        total = sum(parts.values())
        if total > room:
            found.append(f"{total / GIB:.2f} GiB of {what}, {room / GIB:.2f} are there")
    return tuple(found)


def check_tiers(recipe: RlRecipe, models: Sequence[Held]) -> None:
    """ConfigError for a tier that no model of its own weights goes to."""
    frozen = {
        "reference": [model for model in models if model.name in ("reference", "teacher")],
        "rewards": [model for model in models if _is_reward(model)],
    }
    for key, there in frozen.items():
        tier = getattr(recipe.memory, key)
        if tier == "host" and recipe.model.device == "cpu":
            raise ConfigError(
                f'memory.{key} is "host", which moves off a GPU, and the model is on the CPU; use '
                '"disk"',
                param=f"memory.{key}",
            )
        if tier != "memory" and not any(model.tier != "memory" for model in there):
            raise ConfigError(
                f"memory.{key} is {tier!r}, but this run holds no such model of its own: there is "
                "none, or it is an adapter of the policy's base; leave it out",
                param=f"memory.{key}",
            )


def choices(recipe: RlRecipe, models: Sequence[Held]) -> dict[str, list[Any]]:
    """What may be set otherwise, by key; the last value takes least."""
    away = "disk" if recipe.model.device == "cpu" else "host"
    longest = recipe.prompts.max_tokens + recipe.rollout.max_tokens
    sequences = recipe.rollout.prompts_per_step * recipe.rollout.group_size
    micro = recipe.algorithm.micro_tokens
    return {
        "algorithm.micro_tokens": [*_halved(micro, max(longest, min(micro, _FEWEST_TOKENS)))],
        "rollout.kv_tokens": [*_halved(recipe.rollout.kv_tokens or longest * sequences, longest)],
        "memory.reference": _tiers(models, "reference", away),
        "memory.rewards": _tiers(models, "rewards", away),
        "checkpoint.is_async": [False] if recipe.checkpoint.is_async else [],
        "rollout.weights": ["policy"] if planned_weights(recipe) == "packed" else [],
    }


def placements(
    recipe: RlRecipe, models: Sequence[Held], fixed: Sequence[str] = ()
) -> Iterator[Change]:
    """All placements beside the recipe's own."""
    options = [
        [(key, None), *((key, value) for value in values)]
        for key, values in choices(recipe, models).items()
        if key not in fixed
    ]
    for chosen in itertools.product(*options):
        change = {key: value for key, value in chosen if value is not None}
        if change:
            yield change


def changed_recipe(recipe: RlRecipe, change: Change) -> RlRecipe:
    """The recipe with other values for some keys. ConfigError where they do not go together."""
    altered = _altered(recipe, change)
    try:
        return RlRecipe.model_validate(altered.model_dump(mode="json", exclude_unset=True))
    except ValueError as error:
        raise ConfigError(f"{change} does not go with the recipe: {error}") from error


def _altered(recipe: RlRecipe, change: Change) -> RlRecipe:
    """As `changed_recipe`, unchecked: hundreds of placements are looked at."""
    found: Any = recipe
    for key, value in change.items():
        found = _with(found, key.split("."), value)
    altered: RlRecipe = found
    return altered


def _with(section: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    inner = getattr(section, name)
    if inner is None:  # [adapter], with its defaults
        inner = AdapterConfig.model_validate({})
    return section.model_copy(update={name: _with(inner, rest, value) if rest else value})


def _planned(recipe: RlRecipe, models: Sequence[Held], change: Change) -> RlPlan:
    chosen = _altered(recipe, change)
    moved = [replace(model, tier=_tier(chosen, model)) for model in models]
    return RlPlan(chosen, needs_of(chosen, moved), change)


def _tier(recipe: RlRecipe, model: Held) -> Any:
    if not model.can_move:
        return "memory"
    if model.name in ("reference", "teacher"):
        return recipe.memory.reference
    return recipe.memory.rewards if _is_reward(model) else "memory"


def _is_reward(model: Held) -> bool:
    return model.name.startswith("reward")


def _tiers(models: Sequence[Held], key: str, away: str) -> list[str]:
    """Where such models may go that are in memory now."""
    names = ("reference", "teacher")
    there = [m for m in models if (_is_reward(m) if key == "rewards" else m.name in names)]
    return [away] if any(m.can_move and m.tier == "memory" for m in there) else []


def _halved(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _cost(recipe: RlRecipe, change: Change) -> float:
    """How much slower a placement is, in no unit: only the order matters.

    Micro-batches cost little until they are small; fewer sequences at a time make every rollout
    step serve fewer; a tier costs a pass over the model's weights a micro-batch.
    """
    cost = 0.0
    if micro := change.get("algorithm.micro_tokens"):
        cost += sum(0.2 if tokens >= 1024 else 1.0 for tokens in
                    _halved(recipe.algorithm.micro_tokens, micro))  # fmt: skip
    if kv := change.get("rollout.kv_tokens"):
        longest = recipe.prompts.max_tokens + recipe.rollout.max_tokens
        sequences = recipe.rollout.prompts_per_step * recipe.rollout.group_size
        cost += 1.5 * math.log2((recipe.rollout.kv_tokens or longest * sequences) / kv)
    cost += 0.5 * ("checkpoint.is_async" in change)
    cost += 1.0 * ("memory.reference" in change) + 1.0 * ("memory.rewards" in change)
    return cost + 2.0 * ("rollout.weights" in change)


def _proposals(recipe: RlRecipe) -> list[Change]:
    """Single changes that may change results, smallest first."""
    found: list[Change] = []
    has_critic = recipe.algorithm.kind == "ppo"
    for states in ("bfloat16", "8bit"):
        both: Change = {"optim.states": states}
        found.append({**both, "critic.optim.states": states} if has_critic else both)
    if recipe.model.dtype == "float32":
        found.append({"model.dtype": "bfloat16"})
    else:
        bare: Change = {"optim.master": False}
        found.append({**bare, "critic.optim.master": False} if has_critic else bare)
    if recipe.rollout.workers:
        found.append({"rollout.workers": 0})
    found += [{"rollout.max_tokens": size} for size in _halved(recipe.rollout.max_tokens, 32)]
    found += [{"prompts.max_tokens": size} for size in _halved(recipe.prompts.max_tokens, 32)]
    if recipe.adapter is None:
        found.append({"adapter.rank": 16})
    return found


def _tried(
    recipe: RlRecipe, change: Change, budget: Budget, locate: Locate
) -> tuple[Change, float] | None:
    """The change with the cheapest placement beside it, where that fits."""
    try:
        altered = changed_recipe(recipe, change)
        models = held_models(altered, locate)
    except SternaError:
        return None
    found = _cheapest(altered, models, budget)
    return None if found is None else ({**change, **found.changes}, found.peak)
