"""Writes a container tensor by tensor, so that a stopped run goes on where it was.

The folder is built beside its place (`.NAME.partial`) and renamed at the end: readers see all of
it or nothing. Offsets are known before the first tensor (`file.layout`), so each is written in
its place as it comes and noted with its checksum in a journal; after a crash, a tensor counts as
done when the journal has it and its bytes still have that checksum. The header comes last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from sterna.core.errors import QuantizeError
from sterna.core.log import get_logger
from sterna.core.rundir import write_atomic
from sterna.quant.file import (
    FILE_NAME,
    TensorSpec,
    WeightSpec,
    header_bytes,
    layout,
    tensor_bytes,
    tensor_sum,
)

_JOURNAL = ".journal"
_SPARE_BYTES = 16 << 20  # tokenizer, journal, file system overhead
log = get_logger(__name__)


class ContainerWriter:
    """One container being written. `job` says what is written from what; another job starts anew.

    Use as a context manager: it holds the folder's lock, so two processes take turns. Raises
    QuantizeError when the disk is too small or full; what is written stays for the next run.
    """

    def __init__(
        self, out: Path, job: str, format_name: str,
        specs: list[TensorSpec], weights: Mapping[str, WeightSpec],
    ) -> None:  # fmt: skip
        self.out = out
        self.folder = partial_folder(out)
        self._job = job
        self._format_name = format_name
        self._weights = weights
        self._places = layout(specs)
        self._start = len(header_bytes(self._places, weights, format_name, {}))
        self.num_bytes = self._start + sum(spec.nbytes for spec, _ in self._places.values())
        self._done: dict[str, str] = {}
        self._stack = contextlib.ExitStack()
        self._file = -1

    def __enter__(self) -> ContainerWriter:
        try:
            self._stack.enter_context(folder_lock(self.folder))
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / FILE_NAME
        self._done = self._resumable(path)
        self._check_disk(path)
        if not self._done:
            path.unlink(missing_ok=True)
            write_atomic(self.folder / _JOURNAL, json.dumps({"job": self._job}) + "\n")
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._stack.callback(os.close, self._file)

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def has(self, name: str) -> bool:
        """Whether an earlier run, or this one, has written the tensor."""
        return name in self._done

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place. Its shape and dtype must be those of its TensorSpec."""
        spec, offset = self._places[name]
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), name
        self._put(tensor_bytes(tensor), self._start + offset)
        digest = tensor_sum(tensor)
        with (self.folder / _JOURNAL).open("a") as journal:
            journal.write(json.dumps({"tensor": name, "sha256": digest}) + "\n")
        self._done[name] = digest

    def finish(self, texts: Mapping[str, str | bytes]) -> None:
        """Write the header and the other files of the folder, and move it into its place."""
        missing = [name for name in self._places if name not in self._done]
        assert not missing, f"never written: {missing}"
        header = header_bytes(self._places, self._weights, self._format_name, self._done)
        self._put(memoryview(header), 0)
        os.fsync(self._file)
        with refused_when_full(self.out, self.num_bytes):
            for name, text in texts.items():
                write_atomic(self.folder / name, text)
        (self.folder / _JOURNAL).unlink()
        replace_folder(self.folder, self.out)

    def _put(self, data: memoryview, offset: int) -> None:
        with refused_when_full(self.out, self.num_bytes):
            while data:
                count = os.pwrite(self._file, data, offset)
                data, offset = data[count:], offset + count

    def _resumable(self, path: Path) -> dict[str, str]:
        """Tensors of an earlier run of this job whose bytes are still right."""
        first, *lines = _journal_lines(self.folder / _JOURNAL) or [{}]
        if first.get("job") != self._job or not path.exists():
            return {}
        found = {}
        with path.open("rb") as file:
            for line in lines:
                spec, offset = self._places[line["tensor"]]
                file.seek(self._start + offset)
                if hashlib.sha256(file.read(spec.nbytes)).hexdigest() == line["sha256"]:
                    found[spec.name] = line["sha256"]
        if found:
            log.info("%s: going on after %d of %d tensors", self.out, len(found), len(self._places))
        return found

    def _check_disk(self, path: Path) -> None:
        present = path.stat().st_blocks * 512 if path.exists() and self._done else 0
        free = shutil.disk_usage(self.folder).free
        if free < self.num_bytes - present + _SPARE_BYTES:
            raise QuantizeError(
                f"{self.out}: {self.num_bytes - present:,} bytes are needed, {free:,} are free on "
                "that disk; free some or choose another --output"
            )


def partial_folder(out: Path) -> Path:
    """Where the folder `out` is built."""
    return out.with_name(f".{out.name}.partial")


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; another process that holds it is waited for, and that is said."""
    path = folder.with_name(f"{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _locked(path)
    try:
        yield
        path.unlink(missing_ok=True)
    finally:
        os.close(file)


def _locked(path: Path) -> int:
    """A locked descriptor of the file that has this name now (its last holder removes it)."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: another process is writing there; waiting for it", path.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)


@contextlib.contextmanager
def refused_when_full(out: Path, num_bytes: int) -> Iterator[None]:
    """Turns "disk full" and its kin into a QuantizeError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise QuantizeError(
            f"{out}: the disk is full ({error.strerror}); {num_bytes:,} bytes are needed in all. "
            "Free some and run the same command again: it goes on where it stopped"
        ) from error


def replace_folder(new: Path, old: Path) -> None:
    """Rename `new` to `old`. A folder in the way is moved aside first and removed last."""
    aside = old.with_name(f".{old.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if old.exists():
        os.rename(old, aside)
    os.rename(new, old)
    shutil.rmtree(aside, ignore_errors=True)


def _journal_lines(path: Path) -> list[dict[str, str]]:
    """The journal's lines; a torn last one is dropped."""
    found: list[dict[str, str]] = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        for line in path.read_text().splitlines():
            found.append(json.loads(line))
    return found
