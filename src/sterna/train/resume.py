"""Which checkpoint a run goes on from, and whether its recipe still allows that."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sterna.core.errors import CheckpointError, ConfigError
from sterna.core.log import get_logger
from sterna.parallel.collectives import broadcast_object
from sterna.parallel.mesh import Mesh
from sterna.train import checkpoint
from sterna.train.config import Recipe
from sterna.train.recipe import changes, make_recipe

_log = get_logger(__name__)

# What a resumed run may change: how long, where to, how often, and what changes no bit of it.
FREE = (
    "run.steps",
    "run.output",
    "run.threads",
    "log.*",
    "checkpoint.*",
    "eval.*",
    "data.prefetch",
    "longseq.folder",
    "offload.*",  # the same bits wherever they wait
    "model.path",  # weights come from the checkpoint; but an adapter's or student's base does not
    "parallel.timeout_s",
)
# Kinds whose checkpoints are not all of the model, or that compare it with where it began.
_APART = ("distill", "dpo", "kto")


def find_source(recipe: Recipe, resume: bool, mesh: Mesh) -> Path | None:
    """The checkpoint to go on from; None = a new run. All ranks get the same answer.

    ConfigError when a new run would write into an old one's folder or a resumed one has changed
    in more than FREE; CheckpointError for another number of ranks.
    """
    _check_writable(recipe.run.output)
    folder = recipe.run.output / "checkpoints"
    found = _tidied(folder) if mesh.is_main else None
    newest: Path | None = broadcast_object(found, mesh.data)
    if newest is None:
        if resume:
            _log.warning("%s has no checkpoint; starting from the beginning", recipe.run.output)
        return None
    if not resume:
        raise ConfigError(
            f"{recipe.run.output} holds a run already ({newest.name}); go on with --resume, or "
            "give another run.output",
            param="run.output",
        )
    meta = checkpoint.read_meta(newest)
    check_recipe(recipe, meta["recipe"], newest)
    _check_world(mesh, meta["world"], newest)
    return newest


def check_recipe(recipe: Recipe, saved: dict[str, Any], folder: Path) -> None:
    """ConfigError naming the keys that may not differ from the saved recipe."""
    found = changes(recipe, make_recipe(saved, type(recipe)))
    is_apart = recipe.adapter is not None or recipe.kind in _APART  # from the base
    free = [key for key in FREE if key != "model.path" or not is_apart]
    free += ["longseq.*"] if recipe.longseq.auto else []
    bad = {k: v for k, v in found.items() if not any(fnmatch(k, pattern) for pattern in free)}
    if bad:
        named = ", ".join(f"{key} ({old!r}, now {new!r})" for key, (old, new) in bad.items())
        raise ConfigError(
            f"the recipe differs from that of {folder}: {named}. Only {', '.join(free)} may "
            "change; restore it, or start a new run with model.path = that checkpoint",
        )


def _check_writable(output: Path) -> None:
    """ConfigError when the run's folder cannot be made, long before the model is read."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise PermissionError(0, "no permission to write there")
    except OSError as error:
        raise ConfigError(
            f"run.output {output} cannot be a run's folder: {error.strerror}; give another",
            param="run.output",
        ) from error


def _tidied(folder: Path) -> Path | None:
    checkpoint.remove_leftovers(folder)
    return checkpoint.newest(folder)


def _check_world(mesh: Mesh, saved: dict[str, int], folder: Path) -> None:
    now = {"dp": mesh.dp.size, "sp": mesh.sp.size}
    if saved != now:
        raise CheckpointError(
            f"{folder} was written by dp {saved['dp']} x sp {saved['sp']} ranks, this run has dp "
            f"{now['dp']} x sp {now['sp']}; start as many, or a new run with model.path = it"
        )
