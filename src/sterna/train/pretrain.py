"""Pretraining: from random weights by a config, or continued from a model."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from sterna.core.errors import ConfigError
from sterna.kernels.load import load_kernels
from sterna.model.config import ModelConfig, parse_config
from sterna.model.decoder import Decoder
from sterna.model.load import DTYPES
from sterna.parallel.mesh import Mesh
from sterna.train.config import Recipe
from sterna.train.init_weights import init_weights
from sterna.train.sft import Sft


class Pretrain(Sft):
    """As fine-tuning, but `model.config` may describe a model that does not exist yet."""

    def build(self, recipe: Recipe, mesh: Mesh, source: Path | None) -> nn.Module:
        """The model of `source`, else a new one, else that of the recipe's path."""
        if source is not None or recipe.model.config is None:
            return super().build(recipe, mesh, source)
        load_kernels()
        config = read_config(recipe.model.config)
        decoder = Decoder(config, DTYPES[recipe.model.dtype])
        init_weights(decoder, recipe.run.seed)
        return decoder.to(mesh.device)


def read_config(path: Path) -> ModelConfig:
    """The ModelConfig of a config.json. ConfigError when the file cannot be read."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: {error}; give a Hugging Face config.json", param="model.config"
        ) from error
    config = parse_config(values, str(path))
    if config.swiftkv is not None:
        raise ConfigError(
            f"model.config {path}: describes a SwiftKV model, which is distilled from another; "
            "give the config.json of a plain model",
            param="model.config",
        )
    return config
