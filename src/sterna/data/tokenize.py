"""Rows to documents: read, render, tokenise, find the targets, fit the length.

A token is trained iff its first character lies in a trained span. So a token that begins before
the assistant's turn and reaches into it is not trained (the model is never asked to begin in the
middle of it), and one that begins inside the turn and reaches beyond is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sterna.core.errors import DataError, RequestError, RowError
from sterna.data.config import DataConfig
from sterna.data.formats import Conversation, Plain, read_row
from sterna.data.pack import IGNORE, Document
from sterna.data.source import RawRow, Source
from sterna.text.chat import ChatRenderer
from sterna.text.tokenizer import Tokenizer
from sterna.text.trained import trained_text


@dataclass(slots=True)
class Counts:
    """What became of the rows so far. `of` counts by name: rows, bad_rows, too_long (documents
    over seq_len), untrained (without a target), documents, tokens, targets, packed_rows,
    capacity (packed_rows times seq_len), documents_N and tokens_N of source N."""

    NAMED: ClassVar[int] = 20  # bad rows whose place is kept
    of: Counter[str] = field(default_factory=Counter)
    bad_rows: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        """Add another's counts; the first 20 bad rows stay named."""
        self.of.update(other.of)
        self.bad_rows.extend(other.bad_rows[: self.NAMED - len(self.bad_rows)])

    def lost(self) -> str:
        """`of 32 rows 5 malformed, 3 documents too long, 1 without a target`; empty if none is."""
        names = {
            "bad_rows": "malformed",
            "too_long": "documents too long",
            "untrained": "without a target",
        }
        lost = [f"{self.of[key]:,} {name}" for key, name in names.items() if self.of[key]]
        return f"of {self.of['rows']:,} rows {', '.join(lost)}" if lost else ""

    @property
    def fill(self) -> float:
        """The share of the packed rows' capacity that holds tokens (1.0 before any row)."""
        return self.of["tokens"] / self.of["capacity"] if self.of["capacity"] else 1.0


@dataclass(frozen=True, slots=True)
class _Rendered:
    text: str
    spans: tuple[tuple[int, int], ...]
    is_chat: bool
    source: int
    where: str


@dataclass(frozen=True, slots=True)
class _Whole:
    """A tokenised document of any length; arrays as in Document."""

    tokens: NDArray[np.int32]
    targets: NDArray[np.int32]
    source: int
    where: str

    def place(self, at: int) -> str:
        """Where the piece from token `at` on comes from."""
        return f"{self.where} from token {at}" if at else self.where


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
        for source in sources:
            source.check_tokenizer(tokenizer.fingerprint)
            if source.is_tokens and data.train_on == "last":
                raise DataError(
                    f"{source.config.path}: token shards keep which tokens are trained, not which "
                    'turn they are of; pack them with train_on = "last"'
                )

    def make(self, rows: Sequence[RawRow]) -> tuple[list[Document], Counts]:
        """The documents of some rows, in order, and what was counted."""
        counts = Counts(Counter(rows=len(rows)))
        found = [one for row in rows if (one := self._prepare(row, counts)) is not None]
        texts = [one.text for one in found if isinstance(one, _Rendered)]
        encoded = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        documents: list[Document] = []
        for one in found:
            whole = self._whole(one, next(encoded)) if isinstance(one, _Rendered) else one
            documents.extend(self._fitted(whole, counts))
        return documents, counts

    def _prepare(self, row: RawRow, counts: Counts) -> _Rendered | _Whole | None:
        """What is to be tokenised, or is already; None for a bad row that is skipped."""
        if not self._sources[row.source].is_tokens:
            return self._render(row, counts)
        tokens, is_trained = row.raw
        if self._data.train_on == "all":
            is_trained = np.ones(len(tokens), np.bool_)
        where = row.table.where(row.number, row.raw)
        return _Whole(tokens, _shifted(tokens, is_trained), row.source, where)

    def _render(self, row: RawRow, counts: Counts) -> _Rendered | None:
        """The row's text and spans; None for a bad row that is skipped."""
        source = self._sources[row.source]
        where = row.table.where(row.number, row.raw)
        try:
            as_chat = self._as_chat[row.source]
            sample = read_row(row.table.decode(row.raw), source.format, source.config, as_chat)
            if isinstance(sample, Plain):
                found = self._plain(sample, row.source, where)
            else:
                found = self._chat(sample, row.source, where)
            _check_unicode(found.text)
            return found
        except (RowError, RequestError) as error:
            message = f"{where}: {error.message}"
            if self._data.on_bad_row == "fail":
                raise RowError(f'{message}; mend the row or set on_bad_row = "skip"') from error
            counts.of["bad_rows"] += 1
            counts.bad_rows.append(message)
            return None

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

    def _whole(self, one: _Rendered, ids: list[int]) -> _Whole:
        """The whole document."""
        is_trained = list(self._mask(one, ids))
        if not one.is_chat:
            ids = [*self._before, *ids, *self._after]
            is_trained = [False] * len(self._before) + is_trained + [True] * len(self._after)
        if end := self._missing_end(one, ids):
            ids = [*ids, *end]
            is_trained += is_trained[-1:]
        tokens = np.array(ids, np.int32)
        return _Whole(
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

    def _fitted(self, whole: _Whole, counts: Counts) -> list[Document]:
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
            _count(counts, piece)
        return kept

    def _cut(self, whole: _Whole) -> list[int]:
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


def _count(counts: Counts, document: Document) -> None:
    size = len(document.tokens)
    counts.of["documents"] += 1
    counts.of["tokens"] += size
    counts.of["targets"] += int(np.count_nonzero(document.targets != IGNORE))
    counts.of[f"documents_{document.source}"] += 1
    counts.of[f"tokens_{document.source}"] += size


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
