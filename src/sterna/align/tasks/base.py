"""What a built-in task is: endless prompts by number, and what their completions are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from sterna.align.reward import Sample

Part = Literal["train", "eval"]
Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt as text, messages or token ids, and the columns that its reward needs."""

    prompt: str | Messages | list[int]
    row: Mapping[str, Any] = field(default_factory=dict)
    tools: Messages | None = None  # functions that messages may call, for the chat template
    is_plain: bool = False  # a text that no template is put around, whatever prompts.render says


class Task(Protocol):
    """A verifiable task. Options of the recipe are the keyword arguments of its class."""

    name: str

    def prompt(self, index: int, seed: int, part: Part) -> PromptRow:
        """Prompt `index`, the same for the same arguments; the parts have none in common."""
        ...

    def reward(self, samples: Sequence[Sample]) -> list[float]:
        """The reward that is trained on."""
        ...

    def gold(self, samples: Sequence[Sample]) -> list[float] | None:
        """What is really wanted, to see when the two part; None where the reward says it all."""
        ...
