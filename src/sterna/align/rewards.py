"""The rewards of a recipe, ready to be asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sterna.align.adapted import adapted_reward, is_adapter_folder
from sterna.align.config import RewardSection, RlRecipe
from sterna.align.critic import check_tokenizer
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
            if is_adapter_folder(path):
                model = adapted_reward(path, recipe, policy)
            else:
                model = load_value_model(path, recipe.model.dtype, recipe.model.device)
            return ModelReward(model, recipe.algorithm.micro_tokens)
