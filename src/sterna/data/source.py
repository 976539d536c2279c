"""One source of the settings, opened: its files as one list of rows in the order of an epoch."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sterna.core.errors import DataError, RowError
from sterna.data.config import DataConfig, SourceConfig
from sterna.data.files import open_tables
from sterna.data.formats import detect_format, read_row
from sterna.data.order import Blocks, Permutation, mix, uniform
from sterna.data.preferences import prompt_text
from sterna.data.shards import TokenShard
from sterna.data.split import Keys, prompt_key, rows_of_part, source_keys
from sterna.data.tables import Table, nothing_in

_OPEN_TABLES = 256  # the usual limit of open files is 1,024
_LOOKED_AT = 8  # rows by which a format is detected
Order = Callable[[int], int]
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RawRow:
    """A fetched row: its source, its table, its number there and what stands in the file."""

    source: int
    table: Table
    number: int
    raw: Any


class Source:
    """Rows of one source, by number over all its files.

    `part` chooses the rows: "train" leaves out the held-out share, "held_out" is that share. With
    `data.split` the rows are chosen after all sources are open: see `open_sources`.
    """

    def __init__(
        self, config: SourceConfig, data: DataConfig, number: int, part: str = "train"
    ) -> None:
        self.config = config
        self._data = data
        self._number = number
        self._part = part
        self._tables = open_tables(config, data.shuffle_buffer)
        self._ends = list(accumulate(table.num_rows for table in self._tables))
        self._choose(None if data.split else self._held(part))
        self.is_tokens = isinstance(self._tables[0], TokenShard)
        if self.is_tokens:
            self.format = "tokens"
        else:
            self.format = config.format if config.format != "auto" else self._detect()
        self._order: tuple[int, Order] | None = None
        self._used: dict[Table, None] = {}

    def choose_by_prompt(self, rows: Rows, keys: Keys) -> None:
        """Read only `rows`, less or only what is held out: here by prompt, [n] keys of all rows."""
        share = self._data.held_out
        if share:
            key = (self._data.seed, 7)
            held = np.array([uniform(*key, int(keys[i])) < share for i in rows], bool)
            rows = rows[held if self._part == "held_out" else ~held]
        elif self._part == "held_out":
            raise _nothing_held()
        self._choose(rows)

    def prompt_keys(self) -> Iterator[bytes]:
        """A hash of each row's prompt. A row that cannot be read is an example of its own.

        DataError for token shards: what was a prompt in them is not known.
        """
        if self.is_tokens:
            raise DataError(
                f"{self.config.path}: token shards do not say what a prompt is, so data.split "
                "cannot part them; name the files they were packed from"
            )
        for i in range(self._ends[-1]):
            table, inner = self._find(i)
            self._note_use(table)
            raw = table.fetch(inner)
            try:
                sample = read_row(table.decode(raw), self.format, self.config, as_chat=True)
                yield prompt_key(prompt_text(sample))
            except RowError:
                yield prompt_key(f"row {i} of {self.config.path}")

    def _choose(self, rows: Rows | None) -> None:
        """Read these rows, None for all; DataError for none."""
        self._rows = rows
        self.num_rows = self._ends[-1] if rows is None else len(rows)
        if not self.num_rows:
            raise nothing_in(Path(self.config.path), f"row of the part {self._part!r}")

    def _held(self, part: str) -> Rows | None:
        """The rows of the part, None for all: a row is held out by its number alone."""
        share = self._data.held_out
        if not share:
            if part == "held_out":
                raise _nothing_held()
            return None
        key = (self._data.seed, self._number, 7)
        held = (uniform(*key, i) < share for i in range(self._ends[-1]))
        is_held = np.fromiter(held, bool, self._ends[-1])
        return np.flatnonzero(is_held if part == "held_out" else ~is_held)

    def _detect(self) -> str:
        rows = []
        for i in range(min(_LOOKED_AT, self._ends[-1])):
            table, inner = self._find(i)
            try:
                rows.append(table.decode(table.fetch(inner)))
            except RowError:
                continue
        rows = [row for row in rows if isinstance(row, dict)]
        try:
            return detect_format(rows, self.config.fields)
        except RowError as error:
            raise DataError(f"{self._tables[0].path}: {error.message}") from error

    def _find(self, i: int) -> tuple[Table, int]:
        at = bisect_right(self._ends, i)
        return self._tables[at], i - (self._ends[at - 1] if at else 0)

    def fetch(self, draw: int) -> RawRow:
        """The draw-th row this source gives (epochs go on)."""
        epoch, i = divmod(draw, self.num_rows)
        i = self._epoch_order(epoch)(i)
        table, number = self._find(i if self._rows is None else int(self._rows[i]))
        self._note_use(table)
        return RawRow(self._number, table, number, table.fetch(number))

    def _note_use(self, table: Table) -> None:
        """Release the table used longest ago, once newer ones fill the shuffle buffer."""
        is_new = table not in self._used
        self._used.pop(table, None)
        self._used[table] = None
        if not is_new or len(self._used) == 1:
            return
        oldest = next(iter(self._used))
        newer = sum(used.num_rows for used in self._used) - oldest.num_rows
        is_full = not table.is_random and newer >= 2 * self._data.shuffle_buffer
        if is_full or len(self._used) > _OPEN_TABLES:
            oldest.release()
            del self._used[oldest]

    def _epoch_order(self, epoch: int) -> Order:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._make_order(epoch)
        return self._order[1]

    def _make_order(self, epoch: int) -> Order:
        key = mix(self._data.seed, self._number, epoch)
        is_random = all(table.is_random for table in self._tables)
        if self._data.shuffle == "none":
            return int
        if self._data.shuffle == "full" and is_random:
            return Permutation(self.num_rows, key)
        if self._rows is not None:  # a choice of rows has no blocks
            return Blocks([self.num_rows], self._data.shuffle_buffer, key, shuffle_blocks=False)
        sizes = [size for table in self._tables for size in table.blocks]
        return Blocks(sizes, self._data.shuffle_buffer, key, shuffle_blocks=True)

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise DataError for token shards of another tokenizer."""
        for table in self._tables:
            if isinstance(table, TokenShard):
                table.check(fingerprint)

    @property
    def is_over_after(self) -> int | None:
        """Draws after which the source is exhausted; None = never. What is held out is read
        once, however often its source is trained on."""
        epochs = 1 if self._part == "held_out" else self.config.epochs
        return epochs * self.num_rows or None

    def fingerprint(self) -> str:
        """A hash of the content of all files, in order."""
        marks = "\n".join(table.fingerprint() for table in self._tables)
        return hashlib.blake2b(marks.encode(), digest_size=16).hexdigest()


def open_sources(data: DataConfig, part: str = "train") -> list[Source]:
    """All sources of the settings, each with the rows of `part` and of `data.split_part`.

    Raises DataError for sources that cannot be read, are empty or have no row in the part.
    """
    sources = [Source(config, data, n, part) for n, config in enumerate(data.sources)]
    if data.split:
        keys = [source_keys(source) for source in sources]
        chosen = rows_of_part(keys, data.split, data.split_part, data.seed)
        for source, rows, own in zip(sources, chosen, keys, strict=True):
            source.choose_by_prompt(rows, own)
    return sources


def _nothing_held() -> DataError:
    return DataError("nothing is held out; set data.held_out to a share, such as 0.02")
