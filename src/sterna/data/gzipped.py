"""JSON lines in gzip: no index, so they are read from the front and shuffled within a buffer."""

from __future__ import annotations

import gzip
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sterna.core.errors import DataError
from sterna.data.lines import decode_json
from sterna.data.tables import Table, nothing_in


class GzipLines(Table):
    """One JSON object a line, compressed.

    The last `keep` rows read are kept, which is what a shuffle buffer asks for. Going further back
    (another epoch, a resume) reads from the front again, up to the row.
    """

    is_random = False

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self._keep = keep
        self.num_rows = sum(1 for _ in self._lines())
        if not self.num_rows:
            raise nothing_in(path, "row")
        self._rewind()

    def _rewind(self) -> None:
        self._rows = enumerate(self._lines())
        self._kept: OrderedDict[int, tuple[int, bytes]] = OrderedDict()
        self._next = 0

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Line number (from 0) and bytes of every line that is not blank."""
        try:
            with gzip.open(self.path) as file:
                for number, line in enumerate(file):
                    if line.strip():
                        yield number, line
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self.path}: damaged gzip ({error}); fetch it again") from error

    def fetch(self, i: int) -> tuple[int, bytes]:
        if i < self._next and i not in self._kept:
            self._rewind()
        while self._next <= i:
            self._next, line = next(self._rows)
            self._kept[self._next] = line
            self._next += 1
            if len(self._kept) > self._keep:
                self._kept.popitem(last=False)
        return self._kept[i]

    def decode(self, raw: tuple[int, bytes]) -> Any:
        return decode_json(raw[1])

    def where(self, i: int, raw: tuple[int, bytes]) -> str:
        return f"{self.path}:{raw[0] + 1}"

    def num_bytes(self, raw: tuple[int, bytes]) -> int:
        return len(raw[1])

    def release(self) -> None:
        self._rewind()
