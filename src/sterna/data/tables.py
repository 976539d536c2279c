"""Files as tables of rows: opened without being loaded, rows fetched by number.

A table knows how many rows it has, which rows are read together (`blocks`), where a row stands
(`file:line`, for errors) and a fingerprint of the file's content.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sterna.core.errors import DataError

_WHOLE = 1 << 28  # files up to 256 MiB are hashed whole (about 0.3 s)
_PIECE, _PIECES = 1 << 16, 1024


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
        return fingerprint(self.path)


def fingerprint(path: Path) -> str:
    """Size and blake2b of a file; over 256 MiB of 1,024 pieces of 64 KiB spread over it, so a
    change that keeps the size can stay unseen there."""
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if size <= _WHOLE:
            while piece := file.read(1 << 20):
                digest.update(piece)
        else:
            for number in range(_PIECES):
                file.seek((size - _PIECE) * number // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    return f"{size}:{digest.hexdigest()}"


def nothing_in(path: Path, what: str) -> DataError:
    """The error for a file without rows."""
    return DataError(f"{path}: holds no {what}; remove it from the sources or fill it")
