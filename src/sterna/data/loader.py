"""Files to packed rows: the same rows in the same order for any number of threads and ranks.

Rows of the sources are drawn (`mix`), tokenised in small batches (`tokenize`), collected into
windows of about `window_tokens` tokens and packed (`pack`). A window begins where a batch begins,
so the place of the next row is (the place before its window, rows taken of it): a few integers.

Ranks take turns: of every `world` rows of the one global stream, rank r gets the r-th. So the
union over ranks is the same for every world, and a run can go on with another number of ranks.
Each rank walks the whole stream, which costs tokenisation on every rank; packed token shards
(`shards`) spare it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from sterna.core.errors import DataError
from sterna.core.log import get_logger
from sterna.data.ahead import Ahead, mapped
from sterna.data.config import DataConfig
from sterna.data.counts import Counts
from sterna.data.mix import Batch, Cursor, Mixer
from sterna.data.order import Permutation, mix
from sterna.data.pack import Document, PackedRow, filler, pack
from sterna.data.source import Source, open_sources
from sterna.data.tokenize import DocumentMaker
from sterna.text.tokenizer import Tokenizer

_log = get_logger(__name__)
_VERSION = 1
_MIN_WINDOW_ROWS = 16
# Settings that do not change the rows.
_WITHOUT_EFFECT = {"prefetch"}


@dataclass(frozen=True, slots=True)
class _Window:
    """Rows packed together, the place before them and what was counted while making them."""

    start: Cursor
    end: Cursor
    rows: list[PackedRow]
    counts: Counts


class Loader:
    """An iterable of PackedRow for one rank. `counts` is about the global stream, up to and with
    the window that the last row came from.

    Iterating again goes on where the last row was taken. Use it as a context manager, or call
    `close`, to end its threads.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        *,
        rank: int = 0,
        world: int = 1,
        part: str = "train",
        max_document: int | None = None,
    ) -> None:
        """`part`: "train", or "held_out" for the rows that `data.held_out` keeps from training.

        `max_document`: positions the model has; longer documents are too long (data.too_long).
        Raises DataError for sources that cannot be read or are empty.
        """
        assert 0 <= rank < world
        self._data = data
        self._rank, self._world = rank, world
        self._sources = open_sources(data, part)
        self._maker = DocumentMaker(data, self._sources, tokenizer, max_document)
        self._mixer = Mixer(self._sources, data)
        self._identity = _identity(data, self._sources, tokenizer, part)
        self._place = self._mixer.start
        self._taken = 0
        self._before = Counts()  # of all windows before the one at `_place`
        self._window: _Window | None = None
        self._ahead: Iterator[_Window] | None = None

    @property
    def counts(self) -> Counts:
        """What became of the rows so far."""
        total = Counts()
        total.add(self._before)
        if self._window is not None:
            total.add(self._window.counts)
        return total

    def __iter__(self) -> Iterator[PackedRow]:
        while True:
            rows = [row for _ in range(self._world) if (row := self._next_row()) is not None]
            if not rows:
                return
            yield rows[self._rank] if self._rank < len(rows) else filler()

    def _next_row(self) -> PackedRow | None:
        """The next row of the global stream; None at its end."""
        while self._window is None or self._taken >= len(self._window.rows):
            self._leave_window()
            if not self._enter_window():
                self._check_not_empty()
                return None
        self._taken += 1
        return self._window.rows[self._taken - 1]

    def _leave_window(self) -> None:
        if self._window is not None:
            self._before.add(self._window.counts)
            self._place, self._taken, self._window = self._window.end, 0, None

    def _enter_window(self) -> bool:
        """Take the window at the place; False at the end of the stream."""
        if self._ahead is None:
            windows = self._windows(self._place)
            self._ahead = Ahead(windows, 1) if self._data.prefetch else windows
        self._window = next(self._ahead, None)
        if self._window is None:
            return False
        room = Counts.NAMED - len(self._before.bad_rows)
        for message in self._window.counts.bad_rows[: max(room, 0)]:
            _log.warning("skipped: %s", message)
        return True

    def _windows(self, start: Cursor) -> Iterator[_Window]:
        """The windows from a batch border on."""
        documents, counts, end = list[Document](), Counts(), start
        limit = max(self._data.window_tokens, _MIN_WINDOW_ROWS * self._data.seq_len)
        for end, made in mapped(self._make, self._mixer.batches(start), self._data.prefetch):
            documents.extend(made[0])
            counts.add(made[1])
            self._check_progress(counts)
            if counts.of["tokens"] >= limit:
                yield self._packed(start, end, documents, counts)
                documents, counts, start = [], Counts(), end
        if documents or counts.of["rows"]:
            yield self._packed(start, end, documents, counts)

    def _make(self, batch: Batch) -> tuple[Cursor, tuple[list[Document], Counts]]:
        return batch.end, self._maker.make(batch.rows)

    def _packed(
        self, start: Cursor, end: Cursor, documents: list[Document], counts: Counts
    ) -> _Window:
        rows = pack(documents, self._data.seq_len, self._data.packing)
        counts.of["packed_rows"] += len(rows)
        counts.of["capacity"] += len(rows) * self._data.seq_len
        if self._data.shuffle != "none":
            order = Permutation(len(rows), mix(self._data.seed, start.draws, 3))
            rows = [rows[order(i)] for i in range(len(rows))]
        return _Window(start, end, rows, counts)

    def _check_progress(self, counts: Counts) -> None:
        """A source that repeats for ever and never gives a document would hang."""
        rows = counts.of["rows"]
        if not counts.of["documents"] and rows > sum(s.num_rows for s in self._sources):
            raise self._nothing(counts)

    def _check_not_empty(self) -> None:
        if not self.counts.of["documents"]:
            raise self._nothing(self.counts)

    def _nothing(self, counts: Counts) -> DataError:
        of = counts.of
        named = f"; the first: {counts.bad_rows[0]}" if counts.bad_rows else ""
        return DataError(
            f"none of {of['rows']:,} rows gives a document to train on: {of['bad_rows']:,} are "
            f"malformed, {of['too_long']:,} too long, {of['untrained']:,} have no target{named}; "
            "mend the rows, raise data.seq_len, or see data.train_on"
        )

    def state_dict(self) -> dict[str, Any]:
        """The place of the next row, as JSON; the same on every rank after as many rows."""
        return {
            "version": _VERSION,
            "identity": self._identity,
            "draws": self._place.draws,
            "drawn": list(self._place.drawn),
            "taken": self._taken,
            "counts": dict(self._before.of),
            "bad_rows": list(self._before.bad_rows),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at exactly the row after which `state` was taken, with any `world`.

        Raises DataError when files, tokenizer or a setting that shapes the rows have changed.
        """
        if state.get("version") != _VERSION:
            raise DataError(f"the saved data state has version {state.get('version')!r}, this "
                            f"Sterna reads {_VERSION}; start a new run")  # fmt: skip
        _check_identity(state["identity"], self._identity)
        place = Cursor(state["draws"], tuple(state["drawn"]))
        self._restart(place, state["taken"])
        self._before = Counts(Counter(state["counts"]), list(state["bad_rows"]))

    def rewind(self) -> None:
        """Go back to the first row (an evaluation reads the same rows every time)."""
        self._restart(self._mixer.start, 0)
        self._before = Counts()

    def _restart(self, place: Cursor, taken: int) -> None:
        self.close()
        self._place, self._taken, self._window = place, taken, None

    def close(self) -> None:
        """End the threads; iterating again starts them where the last row was taken."""
        if self._window is not None and self._ahead is not None:
            self._window = None  # read again: what follows it is no longer ahead
        if isinstance(self._ahead, Ahead):
            self._ahead.close()
        self._ahead = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _identity(
    data: DataConfig, sources: Sequence[Source], tokenizer: Tokenizer, part: str
) -> dict[str, Any]:
    """What the rows depend on: settings, files, tokenizer and template."""
    settings = data.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    for source in settings["sources"]:
        del source["path"]  # files may move; their content may not change
    return {
        "settings": settings,
        "part": part,
        "files": [source.fingerprint() for source in sources],
        "tokenizer": tokenizer.fingerprint,
    }


def _check_identity(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if saved["tokenizer"] != now["tokenizer"]:
        raise DataError("the tokenizer or chat template is another than when the state was saved; "
                        "resume with the model of the run")  # fmt: skip
    for name, value in now["settings"].items():
        if saved["settings"].get(name) != value:
            raise DataError(
                f"data.{name} was {saved['settings'].get(name)!r} when the state was saved and is "
                f"{value!r} now; the rows would be others. Resume with the recipe of the run"
            )
    if saved["part"] != now["part"]:
        raise DataError(f"the state is of the part {saved['part']!r}, this is {now['part']!r}")
    for number, (old, new) in enumerate(zip(saved["files"], now["files"], strict=True)):
        if old != new:
            raise DataError(
                f"the files of data.sources[{number}] have changed since the state was saved; "
                "restore them, or start a new run"
            )
