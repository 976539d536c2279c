"""Supervised fine-tuning: the answers of chats, by next-token cross entropy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from sterna.core.errors import ConfigError, UnsupportedModelError
from sterna.model.decoder import Decoder
from sterna.model.hf import HFDecoder, load_hf
from sterna.model.hub import resolve_model
from sterna.model.load import load_config, load_model
from sterna.model.save import hf_config
from sterna.model.weights import split_parts
from sterna.parallel.fsdp import full
from sterna.parallel.mesh import Mesh
from sterna.train.config import Recipe
from sterna.train.hooks import Hook
from sterna.train.rowloss import RowLoss
from sterna.train.step import Loss, cross_entropy
from sterna.train.task import Weights, plain_form


class Sft:
    """Continues from a model; all its weights are trained."""

    def build(self, recipe: Recipe, mesh: Mesh, source: Path | None) -> nn.Module:
        """The model of `source`, else of the recipe. ModelError where it cannot be read."""
        if recipe.model.config is not None and recipe.kind != "pretrain":
            raise ConfigError(
                f"model.config is set, but kind = {recipe.kind} continues from a model; give "
                'model.path, or kind = "pretrain" to start from scratch'
            )
        path = source or resolve_model(recipe.model.path)
        if is_foreign(recipe, path):
            return load_hf(path, recipe.model.dtype, mesh.device)
        return plain_form(load_model(path, recipe.model.dtype, mesh.device).decoder, path)

    def loss(self, recipe: Recipe) -> Loss | RowLoss:
        """Next-token cross entropy, smoothed and with z-loss where the recipe says so."""
        rows = recipe.longseq.head_rows or None
        return partial(cross_entropy, chunk_rows=rows, **recipe.loss.model_dump())

    def weights(self, model: nn.Module) -> Weights:
        """The Hugging Face folder of the model."""
        if isinstance(model, HFDecoder):
            return Weights(model.tensors(), model.model.config.to_dict(), {})
        assert isinstance(model, Decoder)
        return Weights(_tensors(model), hf_config(model), {})

    def final(self, model: nn.Module) -> Weights | None:
        """Checkpoints hold the whole model."""
        return None

    def hooks(self, recipe: Recipe) -> Sequence[Hook]:
        """None of its own."""
        return ()


def is_foreign(recipe: Recipe, path: Path) -> bool:
    """Whether the model runs behind transformers: as asked, or since no native family has it."""
    if recipe.model.backend != "auto":
        return recipe.model.backend == "hf"
    try:
        load_config(path)
    except UnsupportedModelError:
        return path.is_dir()
    return False


def _tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors by checkpoint name, one at a time: gathering them is collective."""
    names = decoder.config.hf_names
    for name, parameter in decoder.named_parameters():
        yield from split_parts(name, full(parameter.detach()), names, decoder.config)
