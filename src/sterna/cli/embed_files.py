"""Texts out of a file and vectors into one: text, JSONL or Parquet in; .npy or Parquet out.

The output appears whole or not at all: it is put together beside its place and renamed.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sterna.core.errors import ConfigError, RowError
from sterna.core.lookup import unknown

Floats = NDArray[np.float32]
INPUTS = (".txt", ".jsonl", ".parquet")
OUTPUTS = (".npy", ".parquet")
_BATCH_ROWS = 4096


def check_files(source: Path, output: Path) -> None:
    """ConfigError for a missing input, a kind of file that is not read or written, and an output
    that exists."""
    if not source.is_file():
        raise ConfigError(f"no file {source}; give texts: {', '.join(INPUTS)}")
    for path, known in ((source, INPUTS), (output, OUTPUTS)):
        if path.suffix not in known:
            raise ConfigError(f"{path}: {unknown('kind of file', path.suffix, known)}")
        if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise ConfigError(f"{path}: Parquet needs pyarrow; pip install pyarrow")
    if output.exists():
        raise ConfigError(f"{output} exists; choose another name, or remove it")


def read_texts(path: Path, name: str) -> Iterator[str]:
    """The texts of a file, in order. `name`: the key (JSONL) or the column (Parquet).

    Raises RowError, naming the line, for one that holds no text there.
    """
    if path.suffix == ".parquet":
        yield from _column(path, name)
        return
    with path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, start=1):
                if path.suffix == ".txt":
                    yield line.rstrip("\r\n")
                elif line.strip():
                    yield _json_text(line, name, f"{path}:{number}")
        except UnicodeDecodeError as error:
            raise RowError(f"{path}: not UTF-8 ({error}); convert it first") from error


def _json_text(line: str, name: str, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RowError(f"{place}: not valid JSON ({error})") from error
    if isinstance(row, str):
        return row
    if not isinstance(row, dict) or not isinstance(row.get(name), str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise RowError(f"{place}: no text under {name!r} (found: {found}); name it with --field")
    return str(row[name])


def _column(path: Path, name: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    if name not in file.schema_arrow.names:
        raise ConfigError(f"{path}: {unknown('column', name, file.schema_arrow.names)}")
    at = 0
    for batch in file.iter_batches(_BATCH_ROWS, columns=[name]):
        for value in batch.column(0).to_pylist():
            if not isinstance(value, str):
                raise RowError(f"{path}: row {at} of {name!r} is {value!r}; a text is needed")
            yield value
            at += 1


def write_output(parts: Sequence[Path], output: Path) -> int:
    """Puts the .npy parts together as `output`; returns the rows."""
    shapes = [np.load(part, mmap_mode="r").shape for part in parts]
    rows, width = sum(int(shape[0]) for shape in shapes), int(shapes[0][1])
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    write = _write_npy if output.suffix == ".npy" else _write_parquet
    try:
        write(parts, temporary, rows, width)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return rows


def _write_npy(parts: Sequence[Path], path: Path, rows: int, width: int) -> None:
    header: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.load(part).astype("<f4", copy=False).tobytes())
        file.flush()
        os.fsync(file.fileno())


def _write_parquet(parts: Sequence[Path], path: Path, rows: int, width: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.list_(pa.float32(), width)
    schema = pa.schema([("index", pa.int64()), ("embedding", kind)])
    at = 0
    with pq.ParquetWriter(path, schema) as writer:
        for part in parts:
            values: Floats = np.load(part)
            index = pa.array(np.arange(at, at + len(values)))
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
            writer.write_table(pa.Table.from_arrays([index, vectors], schema=schema))
            at += len(values)
    with path.open("rb") as file:
        os.fsync(file.fileno())
