"""The rewards of a recipe, ready to be asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sterna.align.adapted import adapted_reward, is_adapter_folder, shares_policy_base
from sterna.align.config import RewardSection, RlRecipe
from sterna.align.critic import check_tokenizer
from sterna.align.memory.away import Frozen
from sterna.align.reward import Reward, RewardSum, Sample
from sterna.align.reward_model import ModelReward
from sterna.align.rewards_io import FunctionReward, HttpReward
from sterna.align.tasks.base import Task
from sterna.model.decoder import Decoder
from sterna.model.hub import resolve_model
from sterna.model.value import load_value_model
from sterna.text.tokenizer import Tokenizer


class _Named:
    """A task's method as a reward."""

    def __init__(self, name: str, method: Callable[[Sequence[Sample]], list[float] | None]) -> None:
        self.name = name
        self._method = method

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """The method's numbers."""
        return self._method(samples) or [0.0] * len(samples)


def make_rewards(
    recipe: RlRecipe,
    own: Sequence[Reward],
    task: Task | None,
    tokenizer: Tokenizer,
    policy: Decoder | None = None,
) -> RewardSum:
    """The recipe's rewards, or the caller's; a task's gold metric is logged beside them."""
    if own:
        pairs: list[tuple[Reward, RewardSection]] = [
            (r, RewardSection(kind="function")) for r in own
        ]
    else:
        pairs = [
            (_reward(section, task, recipe, tokenizer, policy), section)
            for section in recipe.rewards
            if section.kind != "task" or task is not None  # only distillation does without
        ]
    if task is not None and task.gold(()) is not None:
        pairs.append((_Named("gold", task.gold), RewardSection(weight=0.0)))
    return RewardSum(pairs)


def _reward(
    section: RewardSection,
    task: Task | None,
    recipe: RlRecipe,
    tokenizer: Tokenizer,
    policy: Decoder | None,
) -> Reward:
    match section.kind:
        case "task":
            assert task is not None, "checked by the recipe"
            return _Named(task.name, task.reward)
        case "function":
            return FunctionReward(section.path, section.timeout_s)
        case "http":
            return HttpReward(section.path, section.timeout_s, section.retries)
        case "model":
            path = resolve_model(section.path)
            check_tokenizer(path, tokenizer, "rewards.path")
            return ModelReward(_frozen_model(path, recipe, policy), recipe.algorithm.micro_tokens)


def _frozen_model(path: Path, recipe: RlRecipe, policy: Decoder | None) -> Frozen:
    """In its tier, but for one on the policy's own base."""
    if not is_adapter_folder(path):
        model = load_value_model(path, recipe.model.dtype, recipe.model.device)
        return Frozen.of(model, recipe, recipe.memory.rewards)
    model = adapted_reward(path, recipe, policy)
    is_shared = policy is not None and shares_policy_base(path, recipe)
    return Frozen.of(model, recipe, "memory" if is_shared else recipe.memory.rewards)
