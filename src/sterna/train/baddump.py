"""The rows of a step that went wrong: kept for looking at, and named by their sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sterna.data.pack import PackedRow


def dump_rows(folder: Path, step: int, rank: int, rows: Sequence[PackedRow]) -> Path:
    """Write the rows as one .npz (tokens_0, targets_0, starts_0, sources_0, tokens_1, ...)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"bad-step-{step:08d}-rank-{rank}.npz"
    arrays = {}
    for index, row in enumerate(rows):
        for name in ("tokens", "targets", "starts", "sources"):
            arrays[f"{name}_{index}"] = np.asarray(getattr(row, name))
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def name_rows(rows: Sequence[PackedRow], sources: Sequence[str], first: int) -> str:
    """`rows 12-13 (of chats.jsonl, gsm8k.jsonl)`: where to look. `first` counts from the start."""
    indices = dict.fromkeys(i for row in rows for i in row.sources if i >= 0)
    names = ", ".join(sources[i] if i < len(sources) else f"source {i}" for i in indices)
    span = f"row {first}" if len(rows) == 1 else f"rows {first}-{first + len(rows) - 1}"
    return f"{span} (of {names})" if names else span
