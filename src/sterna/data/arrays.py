"""A JSON file that is one list of objects (`train.json` of DeepSpeed-Chat), held in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sterna.core.errors import DataError
from sterna.data.tables import Table, nothing_in


class JsonArray(Table):
    """One row an item of the list."""

    def __init__(self, path: Path) -> None:
        """DataError for a file that is no JSON, no list, or empty."""
        self.path = path
        try:
            rows = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: is not valid JSON ({error})") from error
        if not isinstance(rows, list):
            raise DataError(
                f"{path}: holds a {type(rows).__name__}, a list of objects is needed; name a file "
                'with an object a line .jsonl, or set kind = "jsonl"'
            )
        if not rows:
            raise nothing_in(path, "row")
        self._rows = rows
        self.num_rows = len(rows)
        self._row_bytes = path.stat().st_size // len(rows)

    def fetch(self, i: int) -> Any:
        return self._rows[i]

    def decode(self, raw: Any) -> Any:
        return raw

    def num_bytes(self, raw: Any) -> int:
        return self._row_bytes
