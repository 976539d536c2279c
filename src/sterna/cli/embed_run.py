"""A file of texts to vectors in parts, so that a run that was killed goes on where it stopped.

OUTPUT.parts holds a manifest of what is embedded with what, and one .npy for every PART_ROWS texts,
each written whole or not at all. Parts are counted, not trusted: a part is there or it is not. When
all are, they become the output and the folder goes.
"""

from __future__ import annotations

import fcntl
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sterna.cli.embed_files import read_texts, write_output
from sterna.core.errors import ConfigError, RequestError
from sterna.core.rundir import write_atomic

PART_ROWS = 4096
Embed = Callable[[Sequence[str]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class EmbedSummary:
    """What a run did. `resumed`: texts that an earlier run had embedded."""

    texts: int
    resumed: int
    seconds: float
    output: str

    def as_dict(self) -> dict[str, object]:
        """For --json."""
        return asdict(self)


class Parts:
    """The folder of an unfinished output."""

    def __init__(self, output: Path, manifest: Mapping[str, object]) -> None:
        self.folder = output.with_name(output.name + ".parts")
        self._output = output
        self._manifest = json.dumps(manifest, sort_keys=True, indent=1)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Holds the folder against a second run; ConfigError when it is of another job."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(f"{self.folder}: another run writes here; wait for it") from error
            self._check_manifest()
            yield

    def _check_manifest(self) -> None:
        path = self.folder / "manifest.json"
        if not path.exists():
            write_atomic(path, self._manifest)
        elif path.read_text() != self._manifest:
            raise ConfigError(
                f"{self.folder} is of a run with another input, model or settings; finish that "
                "one, remove the folder, or choose another output"
            )

    def finished(self) -> list[Path]:
        """The parts that are there, from the first on without a gap."""
        paths = (self._path(i) for i in itertools.count())
        return list(itertools.takewhile(Path.exists, paths))

    def write(self, number: int, rows: NDArray[np.float32]) -> None:
        """One part, synced before it counts."""
        buffer = io.BytesIO()
        np.save(buffer, rows)
        write_atomic(self._path(number), buffer.getvalue())

    def join(self) -> int:
        """Makes the output of all parts and removes them; returns the rows."""
        rows = write_output(self.finished(), self._output)
        shutil.rmtree(self.folder)
        return rows

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.npy"


def embed_file(
    source: Path,
    field: str,
    parts: Parts,
    embed: Embed,
    note: Callable[[int], None],
) -> tuple[int, int]:
    """(rows of the output, rows found from an earlier run). note: called with texts done.

    Raises RowError and RequestError naming rows of the file, ConfigError for an empty one.
    """
    with parts.opened():
        number = len(parts.finished())
        resumed = number * PART_ROWS
        texts = read_texts(source, field)
        skipped = sum(1 for _ in itertools.islice(texts, resumed))
        note(skipped)
        while chunk := list(itertools.islice(texts, PART_ROWS)):
            parts.write(number, _embedded(embed, chunk, number * PART_ROWS, source))
            number += 1
        if number == 0:
            raise ConfigError(f"{source} holds no text")
        return parts.join(), skipped


def _embedded(embed: Embed, chunk: Sequence[str], first: int, source: Path) -> NDArray[np.float32]:
    try:
        return embed(chunk)
    except RequestError as error:
        place = f"{source}, texts from {first:,} on (counted from 0): "
        raise RequestError(place + error.message, param=error.param) from error


def manifest_of(source: Path, settings: Mapping[str, object]) -> dict[str, object]:
    """What decides the output: the input file's identity and every setting."""
    stat = os.stat(source)
    return {
        "input": str(source.resolve()),
        "size": stat.st_size,
        "modified_ns": stat.st_mtime_ns,
        "part_rows": PART_ROWS,
        **settings,
    }
