"""Several sources as one stream of rows: which source gives the next row, and where it stands.

The choice of draw n is a function of (seed, n) and of which sources are not exhausted, so the place
in the stream is a few integers: nothing is replayed to get there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sterna.core.errors import DataError
from sterna.data.config import DataConfig
from sterna.data.order import mix, uniform
from sterna.data.source import RawRow, Source

# Rows that are read and tokenised together: enough for one call, small enough to be spread.
_BATCH_ROWS = 64
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the stream: draws made so far, and of them by source."""

    draws: int
    drawn: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows drawn together, and the place behind them."""

    rows: list[RawRow]
    end: Cursor


class Mixer:
    """The endless or finite stream of rows of weighted sources."""

    def __init__(self, sources: Sequence[Source], data: DataConfig) -> None:
        self._sources = sources
        self._key = mix(data.seed, 11)
        weights = [s.num_rows if s.config.weight is None else s.config.weight for s in sources]
        self._weights = [weight ** (1 / data.temperature) for weight in weights]
        self._ends = [source.is_over_after for source in sources]
        self.start = Cursor(0, (0,) * len(sources))

    def at(self, draws: int) -> Cursor:
        """The place after `draws` rows, none of which is read; DataError beyond the end."""
        cursor = self.start
        if len(self._sources) == 1:  # the only choice there is
            return Cursor(draws, (draws,))
        while cursor.draws < draws:
            chosen = self._choose(cursor)
            if chosen is None:
                raise DataError(
                    f"the sources end after {cursor.draws} rows, {draws} were asked for"
                )
            cursor = _advanced(cursor, chosen)
        return cursor

    def batches(self, cursor: Cursor) -> Iterator[Batch]:
        """Rows from `cursor` on in small batches."""
        while True:
            rows, size = list[RawRow](), 0
            while len(rows) < _BATCH_ROWS and size < _BATCH_BYTES:
                chosen = self._choose(cursor)
                if chosen is None:
                    break
                row = self._sources[chosen].fetch(cursor.drawn[chosen])
                rows.append(row)
                size += row.table.num_bytes(row.raw)
                cursor = _advanced(cursor, chosen)
            if not rows:
                return
            yield Batch(rows, cursor)

    def _choose(self, cursor: Cursor) -> int | None:
        """The source of the next draw; None when the stream is over."""
        is_over = [
            end is not None and drawn >= end
            for end, drawn in zip(self._ends, cursor.drawn, strict=True)
        ]
        finite = [end is not None for end in self._ends]
        if any(finite) and all(o for o, f in zip(is_over, finite, strict=True) if f):
            return None
        point = uniform(self._key, cursor.draws) * sum(
            weight for weight, over in zip(self._weights, is_over, strict=True) if not over
        )
        last = None
        for number, weight in enumerate(self._weights):
            if not is_over[number]:
                last, point = number, point - weight
                if point < 0:
                    break
        return last


def _advanced(cursor: Cursor, chosen: int) -> Cursor:
    drawn = list(cursor.drawn)
    drawn[chosen] += 1
    return Cursor(cursor.draws + 1, tuple(drawn))
