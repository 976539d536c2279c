"""Files as tables of rows: opened without being loaded, rows fetched by number.

A table knows how many rows it has, which rows are read together (`blocks`), where a row stands
(`file:line`, for errors) and a fingerprint of the file's content.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sterna.core.digest import file_digest
from sterna.core.errors import DataError


class Table(ABC):
    """Rows of one file. `fetch` is called from one thread at a time, `decode` from any."""

    path: Path
    num_rows: int
    # Whether any row costs the same; else rows are read in order, block by block.
    is_random = True

    @property
    def blocks(self) -> Sequence[int]:
        """Numbers of rows that are read together, in file order; they sum to `num_rows`."""
        return [self.num_rows]

    @abstractmethod
    def fetch(self, i: int) -> Any:
        """Row i as it stands in the file (bytes of a line, for example)."""

    @abstractmethod
    def decode(self, raw: Any) -> Any:
        """What `fetch` gave, as a row. Raises RowError (without a place) if it is malformed."""

    def where(self, i: int, raw: Any) -> str:
        """The place of row i, for messages; `raw` is what `fetch` gave."""
        return f"{self.path}: row {i + 1}"

    def num_bytes(self, raw: Any) -> int:
        """About how large a fetched row is."""
        return int(raw.nbytes)

    def release(self) -> None:
        """Let go of what only speeds up the next `fetch`: decoded rows, an open file."""
        return

    def fingerprint(self) -> str:
        """A hash of the content."""
        return file_digest(self.path)


def nothing_in(path: Path, what: str) -> DataError:
    """The error for a file without rows."""
    return DataError(f"{path}: holds no {what}; remove it from the sources or fill it")
