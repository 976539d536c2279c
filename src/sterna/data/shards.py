"""Packed token shards: documents that are tokenised once and then only mapped.

A shard is a safetensors file with

- `tokens`, uint16 or uint32 [N]: the documents one after another;
- `is_trained`, uint8 [N]: 1 where the token is a target (it is trained to be predicted);
- `starts`, int64 [D + 1]: where documents begin, starts[0] = 0 and starts[D] = N;

and the metadata `format` ("sterna-tokens"), `version` ("1"), `tokenizer` (its fingerprint),
`vocab_size`, `num_documents` and `num_tokens`. A folder of shards is read in the order of their
names. Documents are whole: packing, cutting to seq_len and shuffling happen when they are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sterna.core.errors import DataError
from sterna.data.pack import IGNORE, Document
from sterna.data.tables import Table, nothing_in

FORMAT, VERSION = "sterna-tokens", "1"
_NUMPY = {"U16": np.uint16, "U32": np.uint32, "U8": np.uint8, "I64": np.int64}


class TokenShard(Table):
    """Documents of one shard, mapped; `fetch` gives (tokens int32 [n], is_trained bool [n])."""

    def __init__(self, path: Path) -> None:
        self.path = path
        meta, parts = _header(path)
        self.tokenizer = meta.get("tokenizer", "")
        try:
            self._tokens, self._trained, self._starts = (
                parts[name] for name in ("tokens", "is_trained", "starts")
            )
        except KeyError as error:
            raise DataError(f"{path}: the shard has no {error}; write it again") from error
        self.num_rows = len(self._starts) - 1
        if self.num_rows < 1:
            raise nothing_in(path, "document")
        sizes = len(self._tokens), len(self._trained), int(self._starts[-1])
        if len(set(sizes)) > 1 or self._starts[0] or np.any(np.diff(self._starts) < 1):
            raise DataError(f"{path}: the shard's parts do not fit together; write it again")

    def fetch(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        here = slice(int(self._starts[i]), int(self._starts[i + 1]))
        return self._tokens[here].astype(np.int32), self._trained[here].astype(np.bool_)

    def decode(self, raw: Any) -> Any:
        return raw

    def where(self, i: int, raw: Any) -> str:
        return f"{self.path}: document {i + 1}"

    def num_bytes(self, raw: Any) -> int:
        return int(raw[0].nbytes)

    def check(self, tokenizer: str) -> None:
        """Raise DataError unless the shard was written with this tokenizer (a fingerprint)."""
        if self.tokenizer != tokenizer:
            raise DataError(
                f"{self.path}: written with another tokenizer or chat template than the model's; "
                "pack the texts again with `sterna data pack`"
            )


def _header(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """The metadata of a safetensors file and its tensors, mapped."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > os.fstat(file.fileno()).st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(size))
        meta = header.pop("__metadata__", {})
        if meta.get("format") != FORMAT or meta.get("version") != VERSION:
            raise ValueError(f"its format is {meta.get('format')!r} {meta.get('version')!r}")
        mapped = np.memmap(path, np.uint8, "r")[8 + size :]
        return meta, {
            name: mapped[slice(*entry["data_offsets"])].view(_NUMPY[entry["dtype"]])
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: no token shard of version {VERSION} ({error})") from error


def write_shards(
    documents: Iterable[Document],
    folder: Path,
    tokenizer: str,
    vocab_size: int,
    shard_tokens: int = 1 << 27,
) -> list[Path]:
    """Write documents as shards of about `shard_tokens` tokens; returns the files.

    Each file appears whole or not at all. Raises DataError if the folder holds shards already or
    there is no document, OSError if the disk is full.
    """
    if any(folder.glob("*.safetensors")):
        raise DataError(f"{folder}: holds shards already; choose another folder or remove them")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, part in enumerate(_parts(documents, shard_tokens)):
        files.append(folder / f"tokens-{number:05}.safetensors")
        _write(files[-1], part, tokenizer, vocab_size)
    if not files:
        raise DataError("no document to write; see the counts of the rows")
    return files


def _parts(documents: Iterable[Document], limit: int) -> Iterator[list[Document]]:
    part, size = list[Document](), 0
    for document in documents:
        part.append(document)
        size += len(document.tokens)
        if size >= limit:
            yield part
            part, size = [], 0
    if part:
        yield part


def _write(path: Path, part: Sequence[Document], tokenizer: str, vocab_size: int) -> None:
    starts = np.cumsum([0, *(len(document.tokens) for document in part)], dtype=np.int64)
    tokens = np.concatenate([document.tokens for document in part])
    trained = [np.append(False, document.targets[:-1] != IGNORE) for document in part]
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": tokenizer,
        "vocab_size": str(vocab_size),
        "num_documents": str(len(part)),
        "num_tokens": str(len(tokens)),
    }
    arrays = {
        "tokens": tokens.astype(np.uint16 if vocab_size <= 1 << 16 else np.uint32),
        "is_trained": np.concatenate(trained).astype(np.uint8),
        "starts": starts,
    }
    unfinished = path.with_suffix(".unfinished")
    try:
        save_file(arrays, unfinished, meta)
        os.replace(unfinished, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
