"""step.json of a step's folder: what it was made from, and that it is finished.

    {"recipe": {...}, "inputs": {"sft": "weights' hash"}, "weights": "hash of its own model" | null}

It is written when a step begins and again when it has ended. Paths inside the run's folder are kept
relative to it, so that a folder may move.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sterna.align.pipeline.config import AlignRecipe
from sterna.core.digest import file_digest
from sterna.core.errors import CheckpointError, ConfigError
from sterna.core.rundir import write_atomic

FILE = "step.json"
# What may differ from a finished step's recipe: nothing of it changes a bit of its model.
FREE = (
    "run.output", "run.threads", "run.dump", "run.samples", "log.*", "checkpoint.*", "eval.*",
    "data.prefetch", "offload.*", "longseq.folder", "parallel.timeout_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Record:
    """What step.json says."""

    recipe: dict[str, Any]  # flat, of text keys
    inputs: dict[str, str]
    weights: str | None  # None while it is under way

    def save(self, folder: Path) -> None:
        """Write it."""
        write_atomic(folder / FILE, json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")


def read_record(folder: Path) -> Record | None:
    """The record of a step; None where it never began. CheckpointError for a damaged file."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return Record(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: {error}; remove the folder {folder} to make the step again"
        ) from error


def record_of(recipe: AlignRecipe, step: str) -> Record:
    """What the step would be made from now. ConfigError where an earlier step is not finished."""
    inputs = {name: _weights_of_finished(recipe, step, name) for name in recipe.needs(step)}
    return Record(_portable(recipe, step), inputs, None)


def check_same(recipe: AlignRecipe, step: str, old: Record, new: Record) -> None:
    """ConfigError naming what an existing step was made from and the run now has otherwise."""
    folder = recipe.folder(step)
    keys = dict.fromkeys((*old.recipe, *new.recipe))
    bad = [
        f"{step}.{key} ({old.recipe.get(key)!r}, now {new.recipe.get(key)!r})"
        for key in keys
        if old.recipe.get(key) != new.recipe.get(key)
        and not any(fnmatch(key, pattern) for pattern in FREE)
    ]
    if bad and old.weights is not None:
        raise ConfigError(
            f"{folder} is finished, and its recipe was another: {', '.join(bad)}. Restore it, or "
            f"remove {folder} and what was made from it, or give another run.output"
        )
    for name, weights in new.inputs.items():
        if old.inputs.get(name) != weights:
            raise ConfigError(
                f"{folder} was made from another {recipe.folder(name)} than the one that is there "
                f"now; remove {folder} to make it again, or give another run.output"
            )


def weights_hash(model: Path) -> str:
    """Of the weight files of a model's folder; those over 256 MiB by pieces."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(model.glob("*.safetensors")):
        digest.update(f"{path.name}:{file_digest(path)}\n".encode())
    return digest.hexdigest()


def _weights_of_finished(recipe: AlignRecipe, step: str, name: str) -> str:
    record = read_record(recipe.folder(name))
    if record is None or record.weights is None:
        raise ConfigError(
            f"{recipe.folder(step)} begins with the model of {recipe.folder(name)}, which is not "
            f"finished; run that step too (steps = {json.dumps([name, step])})"
        )
    return record.weights


def _portable(recipe: AlignRecipe, step: str) -> dict[str, Any]:
    """The step's recipe, flat, with paths of the run's folder relative to it."""
    found: dict[str, Any] = {}
    _flatten(recipe.recipe(step).model_dump(mode="json"), "", str(recipe.run.output), found)
    return found


def _flatten(value: Any, key: str, output: str, found: dict[str, Any]) -> None:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            _flatten(inner, f"{key}.{name}" if key else name, output, found)
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        for i, inner in enumerate(value):
            _flatten(inner, f"{key}[{i}]", output, found)
    elif isinstance(value, str) and value.startswith(output + "/"):
        found[key] = "RUN" + value[len(output) :]
    else:
        found[key] = value
