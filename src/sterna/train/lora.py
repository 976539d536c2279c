"""Low-rank adapters over a frozen base, plain or quantised (LoRA, DoRA; QLoRA-style).

A checkpoint holds the adapter alone, as PEFT's files; the final model is the merged one.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from sterna.core.errors import ConfigError, UnsupportedModelError
from sterna.model.decoder import Decoder
from sterna.model.hf import HFDecoder, load_hf
from sterna.model.hub import resolve_model
from sterna.parallel.mesh import Mesh
from sterna.quant.foreign import quantize_foreign
from sterna.quant.formats import parse_format
from sterna.quant.linear import dequantize_decoder
from sterna.quant.load import AUTO, PLAIN, load_quantized
from sterna.train.adapter import add_adapter, merge_adapter
from sterna.train.adapter_config import AdapterConfig
from sterna.train.adapter_file import adapter_files, load_adapter
from sterna.train.config import Recipe
from sterna.train.sft import Sft, is_foreign
from sterna.train.task import Weights, plain_form

# The losses read the head as one matrix, so it and a tied embedding stay plain.
_PLAIN = ("embed_tokens", "lm_head")


class Lora(Sft):
    """Trains A and B (and DoRA's lengths); everything else stays as it was loaded."""

    def __init__(self, config: AdapterConfig) -> None:
        self._config = config
        self._base = ""

    def build(self, recipe: Recipe, mesh: Mesh, source: Path | None) -> nn.Module:
        """The recipe's base with a new adapter, or with that of `source`."""
        if recipe.model.config is not None or recipe.kind == "distill":
            raise ConfigError(
                "[adapter] adapts an existing model; give model.path and another kind"
            )
        self._base = recipe.model.path
        decoder = _base(recipe, resolve_model(recipe.model.path), mesh)
        if source is not None:
            load_adapter(decoder, source)
        else:
            add_adapter(decoder, self._config, recipe.run.seed)
        return decoder

    def weights(self, model: nn.Module) -> Weights:
        """The adapter as PEFT's files."""
        assert isinstance(model, Decoder | HFDecoder)
        return Weights((), {}, adapter_files(model, self._base))

    def final(self, model: nn.Module) -> Weights | None:
        """The model with its adapter folded in, as plain weights."""
        assert isinstance(model, Decoder | HFDecoder)
        merge_adapter(model)
        return super().weights(model)


def _base(recipe: Recipe, path: Path, mesh: Mesh) -> Decoder | HFDecoder:
    """The model under the adapter, its weights as `model.weights` says."""
    settings = recipe.model
    if not is_foreign(recipe, path):
        decoder = load_quantized(path, settings.dtype, mesh.device, settings.weights).decoder
        dequantize_decoder(decoder, _PLAIN)
        return plain_form(decoder, path)
    _refuse_quantised(path)
    foreign = load_hf(path, settings.dtype, mesh.device)
    if settings.weights not in (AUTO, PLAIN):
        quantize_foreign(foreign, parse_format(settings.weights))
    return foreign


def _refuse_quantised(path: Path) -> None:
    """Files of codes are read by native families alone."""
    file = path / "config.json"
    stored = json.loads(file.read_text()).get("quantization_config") if file.is_file() else None
    if stored:
        raise UnsupportedModelError(
            f"{path}: its weights are quantised ({stored.get('quant_method')}), which only native "
            "families read; give the plain model, and model.weights to round it at load"
        )
