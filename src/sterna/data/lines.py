"""Text files as tables: JSON lines, and plain text by file, line or paragraph.

Opening scans the file once for line breaks (about 1 GB/s) and keeps 8 bytes a line; a row is then
one `pread`. A compressed file has no such index: it is read from the front, in order.
"""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sterna.core.errors import DataError, RowError
from sterna.data.tables import Table, nothing_in

_CHUNK = 1 << 22
_BLANK = 2  # a line of at most these bytes is "\n" or "\r\n"


def _newlines(path: Path) -> NDArray[np.int64]:
    """Offsets behind every line break, from 0 to the end of the file."""
    found = [np.zeros(1, np.int64)]
    at = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + at + 1)
            at += len(chunk)
    ends = np.concatenate(found)
    return ends if ends[-1] == at else np.append(ends, at)


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError(f"is not UTF-8 ({error.reason} at byte {error.start})") from error


def decode_json(raw: bytes) -> Any:
    """A line of JSON; RowError says what is wrong with it."""
    text = _text(raw)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"is not valid JSON ({error})") from error


class _Spans(Table):
    """Rows are byte ranges of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None
        self._starts, self._ends, self._lines = self._spans()
        self.num_rows = len(self._starts)
        if not self.num_rows:
            raise nothing_in(path, "row")

    def _spans(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Start, end and line number (from 0) of every row: here of lines that are not blank."""
        ends = _newlines(self.path)
        lines = np.flatnonzero(self._is_full(ends))
        return ends[lines], ends[lines + 1], lines

    def _is_full(self, ends: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each line holds more than its line break."""
        sizes = np.diff(ends)
        is_full: NDArray[np.bool_] = sizes > _BLANK
        unsure = np.flatnonzero(sizes == _BLANK)  # "\r\n", or one character
        if len(sizes) and sizes[-1] < _BLANK:
            unsure = np.append(unsure, len(sizes) - 1)  # the last line may have no break
        for n in unsure:
            is_full[n] = bool(self._read(int(ends[n]), int(sizes[n])).strip(b"\r\n"))
        return is_full

    def fetch(self, i: int) -> bytes:
        start, end = int(self._starts[i]), int(self._ends[i])
        raw = self._read(start, end - start)
        if len(raw) < end - start:
            raise DataError(f"{self.path}: became shorter while it was read; start again")
        return raw

    def _read(self, at: int, size: int) -> bytes:
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDONLY)
            self._close = weakref.finalize(self, os.close, self._fd)
        return os.pread(self._fd, size, at)

    def where(self, i: int, raw: bytes) -> str:
        return f"{self.path}:{self._lines[i] + 1}"

    def num_bytes(self, raw: bytes) -> int:
        return len(raw)

    def release(self) -> None:
        if self._fd is not None:
            self._close()
            self._fd = None


class JsonLines(_Spans):
    """One JSON object a line."""

    def decode(self, raw: bytes) -> Any:
        return decode_json(raw)


class TextLines(_Spans):
    """One document a line, its line break not included."""

    def decode(self, raw: bytes) -> Any:
        return {"text": _text(raw).rstrip("\r\n")}


class Paragraphs(_Spans):
    """Documents that blank lines separate; a document keeps its inner line breaks."""

    def _spans(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        ends = _newlines(self.path)
        is_full = self._is_full(ends)
        edges = np.diff(np.concatenate([[False], is_full, [False]]).astype(np.int8))
        first, last = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        return ends[first], ends[last], first

    def decode(self, raw: bytes) -> Any:
        return {"text": _text(raw).rstrip("\r\n")}


class WholeFile(Table):
    """One document: the file."""

    num_rows = 1

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.stat().st_size:
            raise nothing_in(path, "text")

    def fetch(self, i: int) -> bytes:
        return self.path.read_bytes()

    def num_bytes(self, raw: bytes) -> int:
        return len(raw)

    def decode(self, raw: bytes) -> Any:
        return {"text": _text(raw)}
