"""Column files as tables: Parquet, by row groups, and Arrow as `datasets.save_to_disk` writes it.

A Parquet row group is decoded as a whole, so the last few are kept and rows are shuffled within a
buffer; Arrow files are mapped, and any row costs the same. pyarrow is loaded when it is needed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sterna.core.errors import DataError
from sterna.data.tables import Table, nothing_in

if TYPE_CHECKING:
    import pyarrow

# Keys under which Arrow cannot tell "absent" from "null": structs of one column share their keys.
_NESTED = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "tools")


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError("Parquet and Arrow files need pyarrow; pip install pyarrow") from error
    return pyarrow


def _bare(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the nulls that Arrow put into its nested columns."""
    return {key: _dropped(value) if key in _NESTED else value for key, value in row.items()}


def _dropped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _dropped(item) for key, item in value.items() if item is not None}
    return [_dropped(item) for item in value] if isinstance(value, list) else value


class Parquet(Table):
    """Rows of a Parquet file, one decoded row group at a time."""

    is_random = False

    def __init__(self, path: Path, keep: int) -> None:
        pa = _pyarrow()
        import pyarrow.parquet as pq

        self.path = path
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: no Parquet file ({error}); fetch it again") from error
        meta = self._file.metadata
        self._sizes = [meta.row_group(n).num_rows for n in range(meta.num_row_groups)]
        self._ends = list(accumulate(self._sizes))
        self.num_rows = meta.num_rows
        if not self.num_rows:
            raise nothing_in(path, "row")
        self._keep = keep + max(self._sizes)
        self._groups: OrderedDict[int, pyarrow.Table] = OrderedDict()

    @property
    def blocks(self) -> Sequence[int]:
        return self._sizes

    def fetch(self, i: int) -> Any:
        group = bisect_right(self._ends, i)
        if group not in self._groups:
            self._groups[group] = self._file.read_row_group(group)
            self._drop_oldest()
        self._groups.move_to_end(group)
        return self._groups[group].slice(i - self._ends[group] + self._sizes[group], 1)

    def _drop_oldest(self) -> None:
        """Keep what a shuffle buffer can ask for: its rows, and the group it begins in."""
        rows = sum(map(len, self._groups.values()))
        while rows - len(next(iter(self._groups.values()))) >= self._keep:
            rows -= len(self._groups.popitem(last=False)[1])

    def release(self) -> None:
        self._groups.clear()

    def decode(self, raw: Any) -> Any:
        return _bare(raw.to_pylist()[0])


class Arrow(Table):
    """Rows of a mapped Arrow file (stream or file format); `chosen` picks and orders them."""

    def __init__(self, path: Path, chosen: Path | None = None) -> None:
        self.path = path
        self._chosen = chosen
        self._table = _mapped(path)
        self._picked = _mapped(chosen).column(0) if chosen is not None else None
        self.num_rows = len(self._table if self._picked is None else self._picked)
        if not self.num_rows:
            raise nothing_in(path, "row")

    def fetch(self, i: int) -> Any:
        return self._table.slice(i if self._picked is None else self._picked[i].as_py(), 1)

    def decode(self, raw: Any) -> Any:
        return _bare(raw.to_pylist()[0])

    def fingerprint(self) -> str:
        own = super().fingerprint()
        return own if self._chosen is None else f"{own}+{Arrow(self._chosen).fingerprint()}"


def _mapped(path: Path) -> Any:
    pa = _pyarrow()
    try:
        mapped = pa.memory_map(str(path))
        try:
            return pa.ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:
            mapped.seek(0)
            return pa.ipc.open_file(mapped).read_all()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: no Arrow file ({error}); fetch it again") from error
