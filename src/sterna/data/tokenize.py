"""Rows to documents: read, render, tokenise, find the targets, fit the length.

A token is trained iff its first character lies in a trained span. So a token that begins before
the assistant's turn and reaches into it is not trained (the model is never asked to begin in the
middle of it), and one that begins inside the turn and reaches beyond is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sterna.core.errors import DataError, RequestError, RowError
from sterna.data.beside import Answers, Whole
from sterna.data.config import DataConfig
from sterna.data.counts import Counts
from sterna.data.fields import Conversation, Labelled, Pair, Plain, Prompt, Sample
from sterna.data.formats import read_row
from sterna.data.pack import IGNORE, Document
from sterna.data.source import RawRow, Source
from sterna.text.chat import ChatRenderer
from sterna.text.tokenizer import Tokenizer
from sterna.text.trained import trained_text

_Text = Conversation | Plain


@dataclass(frozen=True, slots=True)
class _Rendered:
    text: str
    spans: tuple[tuple[int, int], ...]
    is_chat: bool
    source: int
    where: str


@dataclass(frozen=True, slots=True)
class _Read:
    """A row that was read: its sequences (two of a pair), and its note."""

    parts: tuple[_Rendered | Whole, ...]
    note: float = 0.0


class DocumentMaker:
    """Rows to documents for one model and one set of settings. Threads may share it."""

    def __init__(
        self,
        data: DataConfig,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        max_document: int | None = None,
    ) -> None:
        """`max_document`: tokens of a document at most, where that is less than seq_len."""
        self._data = data
        self._limit = min(data.seq_len, max_document or data.seq_len)
        self._sources = sources
        self._tokenizer = tokenizer
        self._renderer = ChatRenderer(tokenizer)
        self._as_chat = [
            source.config.render == "chat"
            or (source.config.render == "auto" and tokenizer.chat_template is not None)
            for source in sources
        ]
        self._before, self._after = _around(tokenizer)
        self._end = _document_end(tokenizer, data.document_end)
        self._answers = Answers(data, tokenizer.bos_token_id, self._limit)
        for source in sources:
            source.check_tokenizer(tokenizer.fingerprint)
            if source.is_tokens and data.rows != "text":
                raise DataError(
                    f"{source.config.path}: token shards hold texts, not answers to compare; name "
                    "the files they were packed from"
                )
            if source.is_tokens and data.train_on == "last":
                raise DataError(
                    f"{source.config.path}: token shards keep which tokens are trained, not which "
                    'turn they are of; pack them with train_on = "last"'
                )

    def make(self, rows: Sequence[RawRow]) -> tuple[list[Document], Counts]:
        """The documents of some rows, in order, and what was counted."""
        counts = Counts(Counter(rows=len(rows)))
        found = [one for row in rows for one in self._prepare(row, counts)]
        texts = [part.text for one in found for part in one.parts if isinstance(part, _Rendered)]
        encoded = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        wholes = [
            [self._whole(p, next(encoded)) if isinstance(p, _Rendered) else p for p in one.parts]
            for one in found
        ]
        if self._data.rows == "text":
            return [d for one in wholes for d in self._fitted(one[0], counts)], counts
        notes = [one.note for one in found]
        return self._answers.documents(wholes, notes, counts), counts

    def _prepare(self, row: RawRow, counts: Counts) -> list[_Read]:
        """What is to be tokenised, or is already; nothing for a bad row that is skipped."""
        if not self._sources[row.source].is_tokens:
            return self._render(row, counts)
        tokens, is_trained = row.raw
        if self._data.train_on == "all":
            is_trained = np.ones(len(tokens), np.bool_)
        where = row.table.where(row.number, row.raw)
        return [_Read((Whole(tokens, _shifted(tokens, is_trained), row.source, where),))]

    def _render(self, row: RawRow, counts: Counts) -> list[_Read]:
        """The row's texts and spans; nothing for a bad row that is skipped."""
        source = self._sources[row.source]
        where = row.table.where(row.number, row.raw)
        try:
            as_chat = self._as_chat[row.source]
            sample = read_row(row.table.decode(row.raw), source.format, source.config, as_chat)
            return [
                _Read(tuple(self._text(half, row.source, where) for half in halves), note)
                for halves, note in self._wanted(sample, counts)
            ]
        except (RowError, RequestError) as error:
            message = f"{where}: {error.message}"
            if self._data.on_bad_row == "fail":
                raise RowError(f'{message}; mend the row or set on_bad_row = "skip"') from error
            counts.of["bad_rows"] += 1
            counts.bad_rows.append(message)
            return []

    def _wanted(self, sample: Sample, counts: Counts) -> list[tuple[tuple[_Text, ...], float]]:
        """The sequences that `data.rows` makes of a sample, and their notes."""
        rows = self._data.rows
        if isinstance(sample, Prompt):
            raise RowError("is a prompt without an answer, which only rollouts can use")
        if isinstance(sample, Pair):
            if rows == "text":
                return [((sample.chosen,), 0.0)]
            if rows == "pairs":
                return [((sample.chosen, sample.rejected), sample.margin)]
            return [((sample.chosen,), 1.0), ((sample.rejected,), 0.0)]
        if isinstance(sample, Labelled) and rows == "labelled":
            return [((sample.answer,), float(sample.is_desirable))]
        if rows != "text":
            needed = "chosen and rejected" if rows == "pairs" else "a label"
            raise RowError(f"has no {needed}, which this kind of training needs")
        if isinstance(sample, Labelled):
            counts.of["undesirable"] += not sample.is_desirable
            return [((sample.answer,), 0.0)] if sample.is_desirable else []
        return [((sample,), 0.0)]

    def _text(self, sample: _Text, source: int, where: str) -> _Rendered:
        if isinstance(sample, Plain):
            found = self._plain(sample, source, where)
        else:
            found = self._chat(sample, source, where)
        _check_unicode(found.text)
        return found

    def _plain(self, sample: Plain, source: int, where: str) -> _Rendered:
        text = sample.prompt + sample.completion
        start = 0 if self._data.train_on == "all" else len(sample.prompt)
        return _Rendered(text, ((start, len(text)),), False, source, where)

    def _chat(self, sample: Conversation, source: int, where: str) -> _Rendered:
        kwargs = {**self._data.template_kwargs, **sample.template_kwargs}
        found = trained_text(
            self._renderer, sample.messages, sample.tools, self._data.train_on, **kwargs
        )
        return _Rendered(found.text, found.spans, True, source, where)

    def _whole(self, one: _Rendered, ids: list[int]) -> Whole:
        """The whole document."""
        is_trained = list(self._mask(one, ids))
        if not one.is_chat:
            ids = [*self._before, *ids, *self._after]
            is_trained = [False] * len(self._before) + is_trained + [True] * len(self._after)
        if end := self._missing_end(one, ids):
            ids = [*ids, *end]
            is_trained += is_trained[-1:]
        tokens = np.array(ids, np.int32)
        return Whole(
            tokens, _shifted(tokens, np.array(is_trained, np.bool_)), one.source, one.where
        )

    def _mask(self, one: _Rendered, ids: list[int]) -> NDArray[np.bool_]:
        if one.spans == ((0, len(one.text)),):
            return np.ones(len(ids), np.bool_)
        starts = self._tokenizer.token_starts(one.text, ids)
        mask = np.zeros(len(ids), np.bool_)
        for span in one.spans:
            first, last = np.searchsorted(starts, span)
            mask[first:last] = True
        return mask

    def _missing_end(self, one: _Rendered, ids: list[int]) -> list[int]:
        """The end token that a plain text needs, or a conversation whose template writes none."""
        if not one.is_chat:
            return [] if self._end is None or ids[-1:] == [self._end] else [self._end]
        has_end = one.text.rstrip().endswith(self._renderer.turn_ends)
        return [] if has_end else list(self._tokenizer.eos_token_ids[:1])

    def _fitted(self, whole: Whole, counts: Counts) -> list[Document]:
        """The document, or its pieces, within seq_len; none if nothing in it is trained.

        Targets were set before the cut, so the last token of a piece is still trained on the
        first of the next.
        """
        tokens, targets = whole.tokens, whole.targets
        size = self._limit
        starts = [0]
        if len(tokens) > size:
            counts.of["too_long"] += 1
            starts = self._cut(whole)
        pieces = [
            Document(tokens[at : at + size], targets[at : at + size], whole.source, whole.place(at))
            for at in starts
        ]
        kept = [piece for piece in pieces if np.any(piece.targets != IGNORE)]
        counts.of["untrained"] += len(pieces) - len(kept)
        for piece in kept:
            counts.add_document(piece)
        return kept

    def _cut(self, whole: Whole) -> list[int]:
        """Where the pieces of a too long document begin."""
        length = len(whole.tokens)
        match self._data.too_long:
            case "fail":
                is_short = self._limit < self._data.seq_len
                limit = "the model's positions are" if is_short else "seq_len is"
                raise DataError(
                    f"{whole.where}: has {length:,} tokens, {limit} {self._limit:,}; raise that or "
                    'set too_long = "truncate", "drop" or "split"'
                )
            case "split":
                return list(range(0, length, self._limit))
            case "truncate":
                return [0]
            case _:
                return []


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("holds half of a UTF-16 pair, which is no text") from error


def _shifted(tokens: NDArray[np.int32], is_trained: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Each position's next token where that is trained, else IGNORE."""
    targets = np.full(len(tokens), IGNORE, np.int32)
    targets[:-1][is_trained[1:]] = tokens[1:][is_trained[1:]]
    return targets


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after any text."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a", add_special_tokens=True)
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return full[:at], full[at + len(bare) :]
    return [], []


def _document_end(tokenizer: Tokenizer, name: str) -> int | None:
    """The id of the token after a plain text."""
    if name == "auto":
        return tokenizer.eos_token_ids[0] if tokenizer.eos_token_ids else None
    found = tokenizer.token_id(name) if name else None
    if name and found is None:
        raise DataError(f"document_end {name!r} is no token of this model; name one, or use auto")
    return found
