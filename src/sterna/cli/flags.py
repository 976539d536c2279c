"""The flags that several verbs share. Imports the settings models, so only verbs import this."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from pydantic import BaseModel

from sterna.engine.config import EngineConfig

ConfigFiles = Annotated[
    tuple[Path, ...],
    Parameter(
        name="--config",
        help="TOML settings, layered left to right; later files and options win",
        negative=(),
        show_default=False,
    ),
]

EngineOptions = Annotated[EngineConfig, Parameter(name="*", group="Engine")]
DEFAULT_ENGINE = EngineConfig.model_validate({})
AsJson = Annotated[bool, Parameter(name="--json", negative=())]


def changed(settings: BaseModel) -> dict[str, object]:
    """The fields of a pydantic model that differ from their defaults, for the log."""
    defaults = {name: field.get_default() for name, field in type(settings).model_fields.items()}
    return {
        name: getattr(settings, name)
        for name, default in defaults.items()
        if getattr(settings, name) != default
    }
