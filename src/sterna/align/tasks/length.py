"""Length control: "answer in about N words", N from 5 to 20. Reward: 1 - |words - N| / N, and EOS.

A completion that ended by length gets 0: the model has to say when it is done.
"""

from __future__ import annotations

from collections.abc import Sequence

from sterna.align.reward import Sample
from sterna.align.tasks.base import Messages, Part, PromptRow
from sterna.data.order import mix

TOPICS = (
    "the sea", "a good breakfast", "trains", "winter", "why people read", "cats", "a rainy day",
    "friendship", "the moon", "gardens", "learning to swim", "old cities", "coffee", "mountains",
    "a lost key", "music", "the first day of school", "bread", "bicycles", "a long walk",
    "birds", "sleep", "market days", "snow", "a new job", "rivers", "letters", "the colour blue",
    "cooking for friends", "clocks", "forests", "a small shop",
)  # fmt: skip


class Length:
    """Topics and word counts; every fourth topic is kept for evaluation."""

    name = "length"

    def __init__(self, least: int = 5, most: int = 20) -> None:
        self._least, self._most = least, most

    def prompt(self, index: int, seed: int, part: Part) -> PromptRow:
        """See Task."""
        kept = [t for i, t in enumerate(TOPICS) if (i % 4 == 3) == (part == "eval")]
        topic = kept[mix(seed, index, 1) % len(kept)]
        count = self._least + mix(seed, index, 2) % (self._most - self._least + 1)
        return PromptRow(self.question(topic, count), {"num_words": count})

    def question(self, topic: str, count: int) -> Messages:
        """What is asked, for `count` words."""
        text = f"Answer in {count} words: what do you think of {topic}?"
        return [{"role": "user", "content": text}]

    def reward(self, samples: Sequence[Sample]) -> list[float]:
        """See the module."""
        return [
            0.0 if sample.rollout.is_truncated else 1.0 - min(1.0, relative_error(sample))
            for sample in samples
        ]

    def gold(self, samples: Sequence[Sample]) -> list[float] | None:
        """Minus the relative error alone."""
        return [-relative_error(sample) for sample in samples]


def relative_error(sample: Sample) -> float:
    """|words - N| / N."""
    wanted: int = sample.row["num_words"]
    return abs(len(sample.completion.split()) - wanted) / wanted
