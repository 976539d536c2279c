"""Rows of prompts by number, from files: a JSONL of prompts, or any sources of `data`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sterna.align.config import PromptSection
from sterna.align.tasks.base import Part, PromptRow
from sterna.core.errors import DataError, RowError
from sterna.data.config import FIELDS, DataConfig
from sterna.data.fields import Conversation, Labelled, Pair, Plain, Prompt, Row, Sample
from sterna.data.formats import read_row
from sterna.data.lines import JsonLines
from sterna.data.mix import Mixer
from sterna.data.order import Permutation, mix
from sterna.data.source import RawRow, open_sources

# Every tenth row of a file is kept for evaluation.
_HELD_OUT = 10


class PromptFile:
    """`prompts.path`: lines with `prompt`, which may be token ids; an epoch is a permutation."""

    def __init__(self, settings: PromptSection, part: Part) -> None:
        """DataError for a file without rows of the part."""
        self._seed = settings.seed
        self._table = JsonLines(Path(settings.path))
        self._rows = [
            i
            for i in range(self._table.num_rows)
            if (i % _HELD_OUT == _HELD_OUT - 1) == (part == "eval")
        ]
        if not self._rows:
            raise DataError(
                f"{settings.path}: no row for the part {part!r}; it has {self._table.num_rows} "
                f"rows, of which every {_HELD_OUT}th is for evaluation"
            )

    def __call__(self, index: int) -> PromptRow:
        """RowError names a row without a prompt."""
        epoch, i = divmod(index, len(self._rows))
        number = self._rows[Permutation(len(self._rows), mix(self._seed, epoch))(i)]
        raw = self._table.fetch(number)
        row = self._table.decode(raw)
        if not isinstance(row, dict) or not row.get("prompt"):
            where = self._table.where(number, raw)
            raise RowError(f"{where}: has no `prompt`; give text, messages or token ids")
        return PromptRow(row["prompt"], {k: v for k, v in row.items() if k != "prompt"})


class PromptSources:
    """`prompts.sources`: the prompts of rows of any format, blended by weight, without an end.

    Rewards get the row's columns but the prompt's, so recorded answers too. Eval prompts that are
    fewer than asked for begin anew.
    """

    def __init__(self, settings: PromptSection, part: Part, has_template: bool) -> None:
        """`has_template`: whether the model has a chat template. Errors as `data` has them."""
        data = _as_data(settings)
        self._sources = open_sources(data, "held_out" if part == "eval" else "train")
        for source in self._sources:
            if source.is_tokens:
                raise DataError(f"{source.config.path}: token shards have no prompts; name texts")
        self._mixer = Mixer(self._sources, data)
        self._as_chat = [_is_chat(s.config.render, settings, has_template) for s in self._sources]
        sizes = [source.is_over_after for source in self._sources]
        self._length = sum(size for size in sizes if size) if all(sizes) else None
        self._first, self._rows, self._end = 0, list[RawRow](), self._mixer.start

    def __call__(self, index: int) -> PromptRow:
        """RowError names a row that is malformed or has no prompt."""
        raw = self._raw(index % self._length if self._length else index)
        source = self._sources[raw.source]
        try:
            row = raw.table.decode(raw.raw)
            sample = read_row(row, source.format, source.config, self._as_chat[raw.source])
            return _prompt_of(sample, _columns(row, source.format, source.config.fields))
        except RowError as error:
            where = raw.table.where(raw.number, raw.raw)
            raise RowError(f"{where}: {error.message}") from error

    def _raw(self, i: int) -> RawRow:
        """Row i of the stream; those read with it are kept, for it is read in order."""
        if not self._first <= i < self._first + len(self._rows):
            start = self._end if i == self._end.draws else self._mixer.at(i)
            batch = next(self._mixer.batches(start))
            self._first, self._rows, self._end = start.draws, batch.rows, batch.end
        return self._rows[i - self._first]


def _as_data(settings: PromptSection) -> DataConfig:
    """What `data` has to know of the prompts: equal settings cut a split alike."""
    sources = [
        {**source.model_dump(), "epochs": 0, "system": source.system or settings.system}
        for source in settings.sources
    ]
    return DataConfig.model_validate(
        {
            "sources": sources,
            "seed": settings.seed,
            "held_out": settings.held_out,
            "split": settings.split,
            "split_part": settings.split_part,
        }
    )


def _is_chat(render: str, settings: PromptSection, has_template: bool) -> bool:
    """The source's own word first, then the section's."""
    chosen = settings.render if render == "auto" else render
    return chosen == "chat" or (chosen == "auto" and has_template)


def _columns(row: Row, format: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """What is not the prompt, a system prompt or tools."""
    taken = {fields.get(name, name) for name in ("prompt", "system", "tools")}
    own = taken & {fields.get(name, name) for name in FIELDS[format]}
    return {key: value for key, value in row.items() if key not in own}


def _prompt_of(sample: Sample, columns: Mapping[str, Any]) -> PromptRow:
    """What the model is asked, without the answer. RowError where nothing is."""
    match sample:
        case Pair():
            return _prompt_of(sample.chosen, columns)
        case Labelled():
            return _prompt_of(sample.answer, columns)
        case Prompt():
            asked = sample.asked
            if isinstance(asked, Plain):
                return PromptRow(asked.prompt, columns, is_plain=True)
            return PromptRow(asked.messages, columns, asked.tools)
        case Plain():
            if not sample.prompt:
                raise RowError("is a text without a prompt, and nothing can be asked of it")
            return PromptRow(sample.prompt, columns, is_plain=True)
    messages = [{k: v for k, v in m.items() if k != "train"} for m in _before_answer(sample)]
    return PromptRow(messages, columns, sample.tools)


def _before_answer(sample: Conversation) -> Sequence[dict[str, Any]]:
    """The messages up to the last one of the user."""
    end = len(sample.messages)
    while end and sample.messages[end - 1].get("role") != "user":
        end -= 1
    if not end:
        raise RowError("no message has the role user, so nothing can be asked of it")
    return sample.messages[:end]
