"""The rows of a step that went wrong: kept for looking at, and named by file and line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sterna.data.pack import PackedRow

_NAMED = 40  # documents in a message; the dump names all


def dump_rows(folder: Path, step: int, rank: int, rows: Sequence[PackedRow]) -> str:
    """Write the rows as one .npz: tokens_0, targets_0, starts_0, sources_0, places_0, tokens_1, ...

    Returns where they are, or why they could not be written: that must not hide what went wrong.
    """
    path = folder / f"bad-step-{step:08d}-rank-{rank}.npz"
    arrays = {}
    for index, row in enumerate(rows):
        for name in ("tokens", "targets", "starts", "sources", "places"):
            arrays[f"{name}_{index}"] = np.asarray(getattr(row, name))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        return f"nowhere ({path}: {error.strerror})"
    return str(path)


def name_rows(rows: Sequence[PackedRow], first: int, stride: int = 1) -> str:
    """`rows 12, 13 (chats.jsonl:3, 17; qa.parquet: row 5)`: every document.

    `first` is the number of the first row in the run's stream, every `stride`-th is one of these.
    """
    places = [place for row in rows for place in row.places if place]
    named = grouped(places[:_NAMED])
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    numbers = ", ".join(str(first + stride * i) for i in range(len(rows)))
    span = f"row {numbers}" if len(rows) == 1 else f"rows {numbers}"
    return f"{span} ({named}{more})" if named else span


def grouped(places: Sequence[str]) -> str:
    """Places by file: `a.jsonl:3, 17; b.parquet: row 5`."""
    by_file: dict[str, list[str]] = {}
    for place in places:
        file, _, number = place.rpartition(":")
        by_file.setdefault(file, []).append(number)
    return "; ".join(f"{file}:{','.join(_spaced(n))}" for file, n in by_file.items())


def _spaced(numbers: Sequence[str]) -> list[str]:
    first, *rest = numbers
    return [first, *(f" {number.lstrip()}" for number in rest)]
