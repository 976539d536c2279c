"""Prompts of a run in an order that a few integers continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sterna.align.config import PromptSection
from sterna.align.tasks.base import Part, PromptRow, Task
from sterna.core.errors import DataError, RowError
from sterna.data.lines import JsonLines
from sterna.data.order import Permutation, mix
from sterna.text.chat import ChatRenderer
from sterna.text.tokenizer import Tokenizer

# Every tenth row of a file is kept for evaluation.
_HELD_OUT = 10
# Prompts in a row that may be too long before the run is told.
_MAX_SKIPPED = 1000


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


class PromptStream:
    """Endless prompts of a file or a task. `position` is all its state."""

    def __init__(
        self,
        settings: PromptSection,
        tokenizer: Tokenizer,
        task: Task | None,
        part: Part = "train",
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """`tools` are told of in rendered prompts. DataError for a file without rows."""
        self._settings = settings
        self._tokenizer = tokenizer
        self._renderer = ChatRenderer(tokenizer)
        self._task = task
        self._part = part
        self._tools = tools
        self._table = None if task is not None else JsonLines(Path(settings.path))
        self.position = 0
        self.num_too_long = 0
        if self._table is not None:
            self._rows = [
                i
                for i in range(self._table.num_rows)
                if (i % _HELD_OUT == _HELD_OUT - 1) == (part == "eval")
            ]
            if not self._rows:
                raise DataError(
                    f"{settings.path}: no row for the part {part!r}; it has "
                    f"{self._table.num_rows} rows, of which every {_HELD_OUT}th is for evaluation"
                )

    def take(self, count: int) -> list[Prompt]:
        """The next prompts. DataError when a thousand in a row are too long; RowError names a row
        without a prompt."""
        found: list[Prompt] = []
        skipped = 0
        while len(found) < count:
            prompt = self._prompt(self.position)
            self.position += 1
            if len(prompt.tokens) <= self._settings.max_tokens:
                found.append(prompt)
                skipped = 0
                continue
            skipped += 1
            self.num_too_long += 1
            if skipped >= _MAX_SKIPPED:
                raise DataError(
                    f"{skipped} prompts in a row have more than prompts.max_tokens = "
                    f"{self._settings.max_tokens} tokens; raise it"
                )
        return found

    def _prompt(self, index: int) -> Prompt:
        row = self._row(index)
        text, special = self._text(row)
        if isinstance(row.prompt, list) and row.prompt and isinstance(row.prompt[0], int):
            tokens = [int(token) for token in row.prompt]
            text = self._tokenizer.decode(tokens)
        else:
            tokens = self._tokenizer.encode(text, special)
        if not tokens:
            raise RowError(f"prompt {index} is empty")
        return Prompt(index, text, np.array(tokens, np.int32), row.row)

    def _row(self, index: int) -> PromptRow:
        if self._task is not None:
            return self._task.prompt(index, self._settings.seed, self._part)
        assert self._table is not None
        epoch, i = divmod(index, len(self._rows))
        number = self._rows[Permutation(len(self._rows), mix(self._settings.seed, epoch))(i)]
        raw = self._table.fetch(number)
        where = self._table.where(number, raw)
        row = self._table.decode(raw)
        if not isinstance(row, dict) or not row.get("prompt"):
            raise RowError(f"{where}: has no `prompt`; give text, messages or token ids")
        return PromptRow(row["prompt"], {k: v for k, v in row.items() if k != "prompt"})

    def _text(self, row: PromptRow) -> tuple[str, bool]:
        """(text, whether the tokenizer adds its special tokens)."""
        settings, prompt = self._settings, row.prompt
        if isinstance(prompt, list) and (not prompt or isinstance(prompt[0], int)):
            return "", False
        if isinstance(prompt, str) and not renders_chat(settings, self._tokenizer):
            return prompt, True
        messages: list[Any] = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        )
        if settings.system and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": settings.system}, *messages]
        return self._renderer.render(messages, self._tools), False
