"""A speculator's folder: model.safetensors with the module's names, config.json with architectures
["SternaSpeculator"] and a section `speculator` (SpeculatorConfig and the target's family).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from sterna.core.errors import ConfigError, ModelFileError
from sterna.model.hf_weights import SafetensorsSource
from sterna.model.load import DTYPES, DTypeName
from sterna.model.speculator import Speculator, SpeculatorConfig

ARCHITECTURE, SECTION, VERSION = "SternaSpeculator", "speculator", 1


def speculator_hf_config(config: SpeculatorConfig) -> dict[str, Any]:
    """The config.json of a speculator."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "sterna_speculator",
        SECTION: {"version": VERSION, **asdict(config)},
    }


def load_speculator(
    folder: Path, dtype: DTypeName = "bfloat16", device: torch.device | str = "cpu"
) -> Speculator:
    """The speculator of a folder. ModelFileError for another kind of folder or a damaged one."""
    path = folder / "config.json"
    config = read_speculator_config(path)
    speculator = Speculator(config)
    fill(speculator, folder)
    return speculator.to(device=device, dtype=DTYPES[dtype])


def read_speculator_config(path: Path) -> SpeculatorConfig:
    """Of a config.json. ModelFileError for another kind of folder."""
    section = _section(path)
    known = {field.name: field for field in fields(SpeculatorConfig)}
    values = {key: section[key] for key in known if key in section}
    values["draft_tokens"] = tuple(values.get("draft_tokens", ()))  # absent in older folders
    try:
        return SpeculatorConfig(**values)
    except (TypeError, ConfigError) as error:
        raise ModelFileError(f"{path}: {error}") from error


@torch.no_grad()
def fill(speculator: Speculator, folder: Path) -> None:
    """Read the weights of a folder into `speculator`. ModelFileError where they do not fit."""
    source = SafetensorsSource(folder)
    for name, parameter in speculator.named_parameters():
        value = source.read(name, parameter.dtype)
        if value.shape != parameter.shape:
            raise ModelFileError(
                f"{folder}: {name} has shape {tuple(value.shape)}, its config asks for "
                f"{tuple(parameter.shape)}"
            )
        parameter.copy_(value)


def _section(path: Path) -> Mapping[str, Any]:
    try:
        section: Mapping[str, Any] = json.loads(path.read_text()).get(SECTION) or {}
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: {error}; give the folder of a speculator") from error
    if section.get("version") != VERSION:
        raise ModelFileError(f"{path}: no section {SECTION!r} of version {VERSION}")
    return section
