"""A checkpoint on disk: a Hugging Face folder that also holds what a run needs to go on.

    step-00000100/
      config.json, model.safetensors, tokenizer.json, ...   `sterna chat FOLDER` reads it
      state/          optimizer, EMA and RNG tensors, torch.distributed.checkpoint
      trainer.json    counters, data position, recipe
      COMPLETE        every file with its size, written last

It is written beside its place (`.step-00000100.tmp`), every file and folder synced, then renamed,
so a folder of that name is whole. COMPLETE finds what happens later: a copy that was cut short.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from sterna.core.errors import CheckpointError
from sterna.core.log import get_logger
from sterna.core.rundir import write_atomic
from sterna.model.save import save_tensors
from sterna.train.task import Weights

_log = get_logger(__name__)
MARKER = "COMPLETE"
META = "trainer.json"
STATE = "state"
_PREFIX = "step-"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All of a run at one step, in memory of its own."""

    step: int
    tensors: dict[str, Tensor]  # weights by checkpoint name; empty on ranks that do not write
    config: dict[str, Any]
    files: dict[str, str | bytes]
    state: dict[str, Tensor]  # of this rank
    meta: dict[str, Any]


def write_checkpoint(
    parent: Path, snapshot: Snapshot, is_main: bool = True, group: dist.ProcessGroup | None = None
) -> Path:
    """Write a checkpoint and return its folder; all ranks call it together.

    Raises OSError or what safetensors and DCP raise for a full disk; nothing is then left behind.
    """
    final = folder_of(parent, snapshot.step)
    work = parent / f".{final.name}.tmp"
    try:
        _together(lambda: _write_model(work, snapshot), is_main, group)
        _save_state(work / STATE, snapshot.state, group)
        _together(lambda: _seal(work, final), is_main, group)
    except BaseException:
        if is_main:
            shutil.rmtree(work, ignore_errors=True)
        raise
    return final


def folder_of(parent: Path, step: int) -> Path:
    """The checkpoint folder of a step."""
    return parent / f"{_PREFIX}{step:08d}"


def checkpoints(parent: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return [path for path in sorted(parent.glob(f"{_PREFIX}*")) if not faults(path)]


def newest(parent: Path) -> Path | None:
    """The newest complete checkpoint; warns of newer ones that are not."""
    for folder in sorted(parent.glob(f"{_PREFIX}*"), reverse=True):
        fault = faults(folder)
        if not fault:
            return folder
        _log.warning("%s is not complete (%s); looking for an older one", folder, fault)
    return None


def faults(folder: Path) -> str:
    """Why a checkpoint is not complete; empty when it is."""
    try:
        sizes: dict[str, int] = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError) as error:
        return f"no readable {MARKER} ({error})"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or not {size} bytes long"
    return ""


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder."""
    return int(folder.name.removeprefix(_PREFIX))


def read_meta(folder: Path) -> dict[str, Any]:
    """The counters, data position and recipe. CheckpointError for an unreadable file."""
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / META}: {error}; resume from another one") from error
    return meta


def load_state(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Fill the tensors of `state` in place. CheckpointError where names or shapes do not fit."""
    reader = FileSystemReader(folder / STATE)
    stored = reader.read_metadata().state_dict_metadata
    for key, tensor in state.items():
        found = stored.get(key)
        size = found.size if isinstance(found, TensorStorageMetadata) else None
        if size != tensor.shape:
            raise CheckpointError(
                f"{folder}: no state {key} of shape {tuple(tensor.shape)} (found "
                f"{None if size is None else tuple(size)}); it is of another model or optimizer"
            )
    _quiet()
    load(dict(state), storage_reader=reader, no_dist=not dist.is_initialized())


def remove(folder: Path) -> None:
    """Delete a checkpoint; renamed first, so that no half of it bears its name."""
    trash = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Delete what a killed run left behind: unfinished and half deleted folders."""
    for pattern in (f".{_PREFIX}*.tmp", f".{_PREFIX}*.old"):
        for path in parent.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def publish(
    checkpoint: Path, target: Path, weights: Weights | None = None, files: Collection[str] = ()
) -> None:
    """Make `target` the model folder of a checkpoint: hard links, so it takes no space.

    `weights`: written in the place of the checkpoint's own; of its files only `files` are kept.
    """
    work = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if weights is not None:
        if weights.config:
            save_tensors(weights.tensors, weights.config, work)
        for name, content in weights.files.items():
            write_atomic(work / name, content)
    for path in checkpoint.iterdir():
        is_kept = path.name not in (MARKER, META) if weights is None else path.name in files
        if path.is_file() and is_kept:
            _link(path, work / path.name)
    _sync_tree(work)
    _replace_folder(work, target)


def _together(act: Callable[[], None], is_main: bool, group: dist.ProcessGroup | None) -> None:
    """Do something on the main rank while the others wait; its error is raised on all."""
    error: Exception | None = None
    if is_main:
        try:
            act()
        except Exception as raised:  # noqa: BLE001  raised below, after the others know
            error = raised
    reasons: list[str] = [str(error) if error is not None else ""]
    if group is not None:
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, reasons[0], group=group)
        reasons = gathered
    if error is not None:
        raise error
    if any(reasons):
        raise CheckpointError("; ".join(reason for reason in reasons if reason))


def _write_model(work: Path, snapshot: Snapshot) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if snapshot.config:
        save_tensors(snapshot.tensors.items(), snapshot.config, work)
    for name, content in snapshot.files.items():
        write_atomic(work / name, content)
    write_atomic(work / META, json.dumps(snapshot.meta, indent=2) + "\n")


def _save_state(folder: Path, state: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    _quiet()
    writer = FileSystemWriter(folder, sync_files=True)
    save(dict(state), storage_writer=writer, process_group=group, no_dist=group is None)


def _quiet() -> None:
    """DCP says at every call that one process saves alone; that is what is meant."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _seal(work: Path, final: Path) -> None:
    """Mark `work` as complete and give it its name."""
    files = [path for path in sorted(work.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(work)): path.stat().st_size for path in files}
    _sync_tree(work)
    write_atomic(work / MARKER, json.dumps(sizes, indent=2) + "\n")
    _sync(work)
    _replace_folder(work, final)


def _replace_folder(work: Path, final: Path) -> None:
    """Rename `work` to `final`, moving an older one out of the way."""
    if final.exists():
        remove(final)
    work.rename(final)
    _sync(final.parent)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
