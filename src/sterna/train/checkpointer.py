"""Keeps the checkpoints of a run: writes them behind its back, keeps few, says when it failed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from sterna.core.errors import CheckpointError
from sterna.core.log import get_logger
from sterna.parallel.mesh import Mesh
from sterna.train import checkpoint
from sterna.train.checkpoint import Snapshot
from sterna.train.config import CheckpointSection

_log = get_logger(__name__)


class Checkpointer:
    """At most one write is under way; `poll` and `wait` raise what went wrong in it.

    `on_saved` is called by them, on the caller's thread, with each folder that became complete.
    """

    def __init__(
        self,
        parent: Path,
        settings: CheckpointSection,
        mesh: Mesh,
        on_saved: Callable[[Path], None],
    ) -> None:
        self.parent = parent
        self._settings = settings
        self._mesh = mesh
        self._on_saved = on_saved
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: Path | None = None
        # A group of its own: the writer's collectives must not meet those of the training thread.
        self._group = dist.new_group(backend="gloo") if mesh.world > 1 else None

    def save(self, snapshot: Snapshot, best_step: int | None) -> None:
        """Write in the background (or now, by setting); waits for the write before it."""
        self.wait()
        self._thread = threading.Thread(
            target=self._write, args=(snapshot, best_step), name="checkpoint"
        )
        self._thread.start()
        if not self._settings.is_async:
            self.wait()

    def poll(self) -> None:
        """Take note of a write that has ended. CheckpointError when it failed."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the write under way. CheckpointError when it failed."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise self._explain(error) from error
        if self._saved is not None:
            self._on_saved(self._saved)

    def close(self) -> None:
        """Let the write under way end; what went wrong in it is logged, not raised."""
        try:
            self.wait()
        except CheckpointError as error:
            _log.error("%s", error)

    def _write(self, snapshot: Snapshot, best_step: int | None) -> None:
        try:
            is_main = self._mesh.is_main
            self._saved = checkpoint.write_checkpoint(self.parent, snapshot, is_main, self._group)
            if is_main:
                self._prune(best_step)
        except (Exception, CheckpointException) as error:  # noqa: BLE001  raised by `wait`
            self._error = error

    def _prune(self, best_step: int | None) -> None:
        complete = checkpoint.checkpoints(self.parent)
        best = checkpoint.folder_of(self.parent, best_step) if best_step is not None else None
        for folder in complete[: -self._settings.keep_last]:
            if folder != best or not self._settings.keep_best:
                checkpoint.remove(folder)

    def _explain(self, error: BaseException) -> CheckpointError:
        last = checkpoint.newest(self.parent)
        kept = f"the last good one is {last}" if last else "there is no earlier one"
        return CheckpointError(
            f"cannot write a checkpoint to {self.parent}: {_reason(error)}; {kept}; free space or "
            "give another run.output, then continue with --resume"
        )


def _reason(error: BaseException | None) -> str:
    """The OSError behind an error where there is one: DCP and zip writers bury it."""
    shown = _unwrapped(error)
    deeper: BaseException | None = shown
    while deeper is not None:
        if isinstance(deeper, OSError) and deeper.strerror:
            return deeper.strerror
        deeper = deeper.__cause__ or deeper.__context__
    text = str(shown).strip()
    return text.splitlines()[0] if text else type(shown).__name__


def _unwrapped(error: BaseException | None) -> BaseException | None:
    """The first rank's own error inside a DCP error."""
    if not isinstance(error, CheckpointException) or not error.failures:
        return error
    first: BaseException = next(iter(error.failures.values()))[0]
    return first
