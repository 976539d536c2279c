"""Which table reads which file: by name, by first bytes, or as told."""

from __future__ import annotations

import glob
from collections.abc import Callable
from pathlib import Path

from sterna.core.errors import DataError
from sterna.data.config import SourceConfig
from sterna.data.lines import JsonLines, Paragraphs, TextLines, WholeFile
from sterna.data.tables import Table

_KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".md": "text", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
_TEXT: dict[str, Callable[[Path], Table]] = {
    "file": WholeFile,
    "line": TextLines,
    "blank_line": Paragraphs,
}


def open_tables(config: SourceConfig, buffer: int) -> list[Table]:
    """The tables of a source, in order of their names. `buffer`: rows a sequential one keeps.

    Raises DataError for a path without files, a file of no known kind, an empty file.
    """
    return [table for path in _paths(config.path) for table in _open(path, config)]


def _paths(path: str) -> list[Path]:
    if Path(path).exists():
        return [Path(path)]
    found = sorted(Path(name) for name in glob.glob(path, recursive=True))
    if not found:
        raise DataError(f"no data at {path}; give a file, a folder or a pattern that matches")
    return found


def _open(path: Path, config: SourceConfig) -> list[Table]:
    kind = config.kind if config.kind != "auto" else _KINDS.get(path.suffix.lower())
    if kind == "jsonl":
        return [JsonLines(path)]
    if kind == "text":
        return [_TEXT[config.documents](path)]
    raise DataError(f"{path}: of no known kind; name it with `kind`")
