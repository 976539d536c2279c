"""What a model is for: generating text, or reading it into vectors and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sterna.core.errors import ConfigError
from sterna.model.encoder_config import is_encoder
from sterna.model.load import read_config_json
from sterna.model.pooling import has_module_files

Task = Literal["generate", "embed"]


def resolve_task(path: Path, asked: str) -> Task:
    """The task of a model folder or file.

    "auto": encoders, and folders with sentence-transformers' modules.json, embed; the rest
    generates. A decoder may be asked to embed; ConfigError when an encoder is asked to generate.
    """
    config = path / "config.json"
    is_encoder_model = config.is_file() and is_encoder(read_config_json(config))
    if asked == "generate" and is_encoder_model:
        raise ConfigError(
            f"task is generate, but {path} is an encoder: it reads whole texts and writes none; "
            "use embed, or leave task at auto",
            param="task",
        )
    if asked == "auto":
        return "embed" if is_encoder_model or has_module_files(path) else "generate"
    return "embed" if asked == "embed" else "generate"
