"""The rewards of a recipe, ready to be asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sterna.align.config import RewardSection, RlRecipe
from sterna.align.critic import check_tokenizer
from sterna.align.reward import Reward, RewardSum, Sample
from sterna.align.reward_model import ModelReward
from sterna.align.rewards_io import FunctionReward, HttpReward
from sterna.align.tasks.base import Task
from sterna.model.hub import resolve_model
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
    recipe: RlRecipe, own: Sequence[Reward], task: Task | None, tokenizer: Tokenizer
) -> RewardSum:
    """The recipe's rewards, or the caller's; a task's gold metric is logged beside them."""
    if own:
        pairs: list[tuple[Reward, RewardSection]] = [
            (r, RewardSection(kind="function")) for r in own
        ]
    else:
        pairs = [
            (_reward(section, task, recipe, tokenizer), section)
            for section in recipe.rewards
            if section.kind != "task" or task is not None  # only distillation does without
        ]
    if task is not None and task.gold(()) is not None:
        pairs.append((_Named("gold", task.gold), RewardSection(weight=0.0)))
    return RewardSum(pairs)


def _reward(
    section: RewardSection, task: Task | None, recipe: RlRecipe, tokenizer: Tokenizer
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
            check_tokenizer(resolve_model(section.path), tokenizer, "rewards.path")
            return ModelReward(section.path, recipe.model, recipe.algorithm.micro_tokens)
