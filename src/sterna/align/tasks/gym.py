"""Tasks of the package `reasoning-gym`: procedural puzzles, each with a verifier of its own.

    [prompts]
    task = "reasoning-gym"
    options = { dataset = "chain_sum", max_terms = 3, max_digits = 2 }

`dataset` may name several, "chain_sum,leg_counting": prompts take turns. Other options go to the
data set's configuration. A puzzle is made from a seed of its own, so prompts do not repeat; the
parts train and eval have no seed in common. The reward is the verifier's score in [0, 1] of what
stands in the last <answer>...</answer>, 0 without one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sterna.align.reward import Sample
from sterna.align.tasks.base import Part, PromptRow
from sterna.core.errors import ConfigError
from sterna.core.lookup import unknown
from sterna.data.order import mix

ANSWER, ANSWER_END = "<answer>", "</answer>"
_FORMAT = "Give the final answer alone as <answer>...</answer>."
_HELD_SEEDS = 30  # bits of a data set's seed; one bit more tells the parts apart


class Gym:
    """Puzzles of one or more data sets."""

    name = "reasoning-gym"

    def __init__(self, dataset: str = "chain_sum", **options: Any) -> None:
        """ConfigError without the package, for an unknown data set or an option it refuses."""
        self._create, known = _package()
        self._names = [name.strip() for name in dataset.split(",")]
        for name in self._names:
            if name not in known:
                raise ConfigError(unknown("data set", name, known), param="prompts.options")
        self._options = options
        # Its verifier needs no data; making one now refuses bad options before the run.
        self._verifiers = {name: self._dataset(name, 0) for name in self._names}

    def prompt(self, index: int, seed: int, part: Part) -> PromptRow:
        """See Task."""
        name = self._names[index % len(self._names)]
        drawn = mix(seed, index, 11) % (1 << _HELD_SEEDS)
        entry = self._dataset(name, 2 * drawn + (part == "eval"))[0]
        content = f"{entry['question']}\n{_FORMAT}"
        return PromptRow([{"role": "user", "content": content}], {"entry": entry, "dataset": name})

    def reward(self, samples: Sequence[Sample]) -> list[float]:
        """See the module."""
        return [
            float(self._verifiers[s.row["dataset"]].score_answer(found, s.row["entry"]))
            if (found := final_answer(s.answer)) is not None
            else 0.0
            for s in samples
        ]

    def gold(self, samples: Sequence[Sample]) -> list[float] | None:
        """See Task."""
        return None

    def _dataset(self, name: str, seed: int) -> Any:
        try:
            return self._create(name, seed=seed, size=1, **self._options)
        except (TypeError, AssertionError, ValueError) as error:
            raise ConfigError(
                f"prompts.options of {name}: {error}", param="prompts.options"
            ) from error


def final_answer(text: str) -> str | None:
    """What stands in the last pair of tags; None without one."""
    head, end, _ = text.rpartition(ANSWER_END)
    _, begin, answer = head.rpartition(ANSWER)
    return answer.strip() if begin and end else None


def _package() -> tuple[Callable[..., Any], Sequence[str]]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError(
            'prompts.task = "reasoning-gym" needs the package reasoning-gym: '
            "pip install reasoning-gym (or sterna[gym])",
            param="prompts.task",
        ) from error
    return reasoning_gym.create_dataset, sorted(DATASETS)
