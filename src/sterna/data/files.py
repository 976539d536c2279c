"""Which files a source's path names, and which table reads which.

A path is a file, a pattern, or a folder: one that `datasets.save_to_disk` wrote (also with splits),
of Parquet files (also as on a hub: `data/train-00000-of-00002.parquet`), of token shards, or any
folder with files of one known kind.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sterna.core.errors import DataError
from sterna.core.lookup import unknown
from sterna.data.arrays import JsonArray
from sterna.data.columns import Arrow, Parquet
from sterna.data.config import SourceConfig
from sterna.data.gzipped import GzipLines
from sterna.data.lines import JsonLines, Paragraphs, TextLines, WholeFile
from sterna.data.shards import TokenShard
from sterna.data.tables import Table, nothing_in

_KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonl.gz": "jsonl", ".json.gz": "jsonl",
    ".txt": "text", ".md": "text", ".text": "text", ".parquet": "parquet", ".arrow": "arrow",
    ".safetensors": "shards", ".json": "json",
}  # fmt: skip
_TEXT: dict[str, Callable[[Path], Table]] = {
    "file": WholeFile,
    "line": TextLines,
    "blank_line": Paragraphs,
}
_GZIP = b"\x1f\x8b"
# Names of .json files that are the splits of a folder (DeepSpeed-Chat has train and eval).
_SPLITS = ("train", "eval", "test", "valid", "validation", "dev")


def open_tables(config: SourceConfig, keep: int) -> list[Table]:
    """The tables of a source, in the order of their names; one that is read in order keeps its
    last `keep` rows.

    Raises DataError for a path without files, a file of no known kind, a file without rows.
    """
    tables = [table for path in _paths(config.path) for table in _open(path, config, keep)]
    if len({isinstance(table, TokenShard) for table in tables}) > 1:
        raise DataError(f"{config.path}: token shards and other files in one source; use two")
    return tables


def _paths(path: str) -> list[Path]:
    if Path(path).exists():
        return [Path(path)]
    found = sorted(Path(name) for name in glob.glob(path, recursive=True))
    if not found:
        raise DataError(f"no data at {path}; give a file, a folder or a pattern that matches")
    return found


def _open(path: Path, config: SourceConfig, keep: int) -> list[Table]:
    if path.is_dir():
        return _open_folder(path, config, keep)
    match config.kind if config.kind != "auto" else _kind(path):
        case "jsonl":
            return [GzipLines(path, keep) if _starts(path, _GZIP) else JsonLines(path)]
        case "json":
            return [JsonArray(path)]
        case "text":
            return [_TEXT[config.documents](path)]
        case "parquet":
            return [Parquet(path, keep)]
        case "arrow":
            return [Arrow(path)]
        case _:
            return [TokenShard(path)]


def _starts(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _kind(path: Path) -> str:
    """The kind by name, else by the first bytes."""
    name = path.name.lower()
    for ending, kind in _KINDS.items():
        if name.endswith(ending):
            return kind
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"ARROW1"):
        return "arrow"
    if head.lstrip().startswith(b"{"):
        return "jsonl"
    if head.lstrip().startswith(b"["):
        return "json"
    raise DataError(
        f"{path}: of no known kind (known names: {', '.join(_KINDS)}); name it with `kind`. "
        "zstd has to be unpacked"
    )


def _open_folder(folder: Path, config: SourceConfig, keep: int) -> list[Table]:
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        return _saved(folder / _split(config.split, splits, folder))
    if (folder / "state.json").is_file():
        return _saved(folder)
    files = [path for path in sorted(folder.rglob("*")) if _is_data(path, config.kind)]
    if not files:
        raise nothing_in(folder, "file of a known kind")
    files = _of_split(files, config.split, folder)
    return [table for path in files for table in _open(path, config, keep)]


def _is_data(path: Path, kind: str) -> bool:
    if not path.is_file() or path.name.startswith((".", "_")):
        return False
    found = next((k for end, k in _KINDS.items() if path.name.lower().endswith(end)), None)
    if found == "json" and not _starts(path, b"["):
        return False  # a config or an index, not rows
    return found is not None and kind in ("auto", found) and path.name.lower() != "readme.md"


def _of_split(files: list[Path], split: str, folder: Path) -> list[Path]:
    """The Parquet files of a split, where their names or folders tell splits apart."""
    names = [_split_of(path, folder) for path in files]
    if any(name is None for name in names):
        return files
    chosen = _split(split, [name for name in names if name], folder)
    return [path for path, name in zip(files, names, strict=True) if name == chosen]


def _split_of(path: Path, folder: Path) -> str | None:
    """The split in a hub's file name (`train-00000-of-00002.parquet`) or its folder's name."""
    stem, dash, rest = path.stem.partition("-")
    if dash and "-of-" in rest:
        return stem
    if path.suffix == ".json" and stem in _SPLITS:
        return stem
    return path.parent.name if path.parent not in (folder, folder / "data") else None


def _split(wanted: str, found: Sequence[str], folder: Path) -> str:
    if wanted not in found:
        raise DataError(f"{folder}: {unknown('split', wanted, set(found))}; set `split`")
    return wanted


def _saved(folder: Path) -> list[Table]:
    """The tables of a folder that `datasets.save_to_disk` wrote."""
    state = _json(folder / "state.json")
    files = [folder / entry["filename"] for entry in state.get("_data_files", [])]
    chosen = [folder / entry["filename"] for entry in state.get("_indices_files") or []]
    if not files:
        raise nothing_in(folder, "Arrow file in its state.json")
    if chosen and (len(files) > 1 or len(chosen) > 1):
        raise DataError(
            f"{folder}: a dataset with an index over several files; save "
            "`dataset.flatten_indices()` instead"
        )
    return [Arrow(file, chosen[0] if chosen else None) for file in files]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); save the dataset again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: no JSON object; save the dataset again")
    return value
