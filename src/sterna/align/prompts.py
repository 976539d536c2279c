"""Prompts of a run in an order that a few integers continue."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sterna.align.config import PromptSection
from sterna.align.promptrows import PromptFile, PromptSources
from sterna.align.tasks.base import Part, PromptRow, Task
from sterna.core.errors import ConfigError, DataError, RowError
from sterna.core.log import get_logger
from sterna.text.chat import ChatRenderer
from sterna.text.tokenizer import Tokenizer

_log = get_logger(__name__)
# Prompts in a row that may be too long or malformed before the run is told.
_MAX_SKIPPED = 1000
_NAMED = 20  # malformed rows that are named


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One prompt, tokenised."""

    index: int  # in its stream: seeds follow from it
    text: str
    tokens: NDArray[np.int32]
    row: Mapping[str, Any]


def renders_chat(settings: PromptSection, tokenizer: Tokenizer) -> bool:
    """Whether text prompts go through the chat template."""
    has_template = tokenizer.chat_template is not None
    return settings.render == "chat" or (settings.render == "auto" and has_template)


def that_fit(settings: PromptSection, context: int, max_tokens: int) -> PromptSection:
    """The settings, dropping prompts that leave no room for `max_tokens` in the context."""
    room = context - max_tokens
    if room < 1:
        raise ConfigError(
            f"rollout.max_tokens is {max_tokens:,}, and prompt and completion have {context:,} "
            "tokens together (the model's context, or rollout.kv_tokens); lower it",
            param="rollout.max_tokens",
        )
    return settings.model_copy(update={"max_tokens": min(settings.max_tokens, room)})


class PromptStream:
    """Endless prompts of files or a task. `position` is all its state."""

    def __init__(
        self,
        settings: PromptSection,
        tokenizer: Tokenizer,
        task: Task | None,
        part: Part = "train",
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """`tools` are told of in rendered prompts. DataError for files without rows."""
        self._settings = settings
        self._tokenizer = tokenizer
        self._renderer = ChatRenderer(tokenizer)
        self._tools = tools
        self._row = _rows(settings, tokenizer, task, part)
        self.position = 0
        self.num_too_long = 0
        self.num_bad = 0

    def take(self, count: int) -> list[Prompt]:
        """The next prompts. DataError when a thousand in a row are too long or malformed; RowError
        names a row without a prompt."""
        found: list[Prompt] = []
        skipped = 0
        while len(found) < count:
            prompt = self._prompt(self.position)
            self.position += 1
            if prompt is not None and len(prompt.tokens) <= self._settings.max_tokens:
                found.append(prompt)
                skipped = 0
                continue
            skipped += 1
            self.num_too_long += prompt is not None
            if skipped >= _MAX_SKIPPED:
                raise DataError(
                    f"{skipped} prompts in a row are malformed or have more than prompts.max_tokens"
                    f" = {self._settings.max_tokens} tokens; mend them or raise it"
                )
        return found

    def _prompt(self, index: int) -> Prompt | None:
        """None for a malformed row that is skipped."""
        try:
            return self.made(index, self._row(index))
        except RowError as error:
            if self._settings.on_bad_row == "fail":
                raise
            self.num_bad += 1
            if self.num_bad <= _NAMED:
                _log.warning("skipped: %s", error.message)
            return None

    def made(self, index: int, row: PromptRow) -> Prompt:
        """A row, rendered and tokenised. RowError for an empty one."""
        text, special = self._text(row)
        if isinstance(row.prompt, list) and row.prompt and isinstance(row.prompt[0], int):
            tokens = [int(token) for token in row.prompt]
            text = self._tokenizer.decode(tokens)
        else:
            tokens = self._tokenizer.encode(text, special)
        if not tokens:
            raise RowError(f"prompt {index} is empty")
        return Prompt(index, text, np.array(tokens, np.int32), row.row)

    def _text(self, row: PromptRow) -> tuple[str, bool]:
        """(text, whether the tokenizer adds its special tokens)."""
        settings, prompt = self._settings, row.prompt
        if isinstance(prompt, list) and (not prompt or isinstance(prompt[0], int)):
            return "", False
        if isinstance(prompt, str) and (
            row.is_plain or not renders_chat(settings, self._tokenizer)
        ):
            return prompt, True
        messages: list[Any] = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        )
        if settings.system and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": settings.system}, *messages]
        tools = self._tools or row.tools
        return self._renderer.render(messages, tools, **settings.template_kwargs), False


def _rows(
    settings: PromptSection, tokenizer: Tokenizer, task: Task | None, part: Part
) -> Callable[[int], PromptRow]:
    """Prompts by number."""
    if task is not None:
        return partial(task.prompt, seed=settings.seed, part=part)
    if settings.sources:
        return PromptSources(settings, part, tokenizer.chat_template is not None)
    return PromptFile(settings, part)
