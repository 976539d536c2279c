"""The settings that a pipeline adds to those of its steps, for the docs and `--settings`."""

from __future__ import annotations

from collections.abc import Iterator

from sterna.align.pipeline.config import AlignRecipe
from sterna.align.pipeline.inherit import FOLDERS
from sterna.train.settings import Setting, all_settings

_ELSEWHERE = tuple(f"{name}." for name in ("model", "data", *FOLDERS))


def pipeline_settings() -> Iterator[Setting]:
    """One a key; a step's own tables, [model] and [data] are one line each."""
    yield from (one for one in all_settings(AlignRecipe) if not one.name.startswith(_ELSEWHERE))
    for name in ("model", "data", *FOLDERS):
        yield Setting(f"{name}.*", "", AlignRecipe.model_fields[name].description or "")
