"""One model on its machines: attention spread over sp, weights over dp x sp, rows that are long."""

from __future__ import annotations

from typing import Any

from sterna.core.errors import ConfigError
from sterna.model.hf import HFDecoder
from sterna.parallel.config import ParallelConfig
from sterna.parallel.fsdp import shard_model
from sterna.parallel.mesh import Axis, Mesh
from sterna.parallel.ulysses import plan_attention
from sterna.train.autoplan import chosen, is_chosen
from sterna.train.config import Recipe
from sterna.train.foreign_shape import foreign_shape
from sterna.train.longseq.apply import apply_longseq
from sterna.train.memory import Shape
from sterna.train.offload.weights import WeightTier


def shards_of(config: ParallelConfig, mesh: Mesh) -> Axis:
    """The axis over which `spread` cuts one weight; of size 1 where each rank keeps all of it."""
    return Axis("whole") if mesh.data.size == 1 or config.shard == "none" else mesh.data


def spread(model: Any, config: ParallelConfig, mesh: Mesh) -> Axis:
    """Prepare `model` for its rank, in place; does nothing on one rank. All ranks call it.

    Returns `shards_of` the mesh. ConfigError for a parallel.ulysses that the heads do not allow.
    """
    plan = plan_attention(mesh, int(model.config.num_attention_heads), config.ulysses)
    if plan is not None:
        model.set_parallel(plan)
    shards = shards_of(config, mesh)
    if shards.size > 1:
        shard_model(model, list(model.layers), mesh)
    return shards


def use_longseq(
    model: Any, recipe: Recipe, mesh: Mesh, num_shards: int, weights: WeightTier | None = None
) -> Recipe:
    """Switch on the recipe's checkpoints and tiles; the recipe with what longseq.auto chose.

    `weights` moves those of the blocks. All ranks call it, before `spread`. ConfigError for what
    FSDP2 or offloading does not allow, UnsupportedModelError for a model behind transformers whose
    layers cannot be proven to work in tiles.
    """
    settings = recipe.longseq
    if settings.auto and not is_chosen(settings):
        settings = chosen(recipe, _shape_of(model), mesh, num_shards)
        recipe = recipe.model_copy(update={"longseq": settings})
    if weights is not None and not settings.checkpoint:
        raise ConfigError(
            "offload.weights needs longseq.checkpoint = true: without it a block's backward reads "
            "weights that are away",
            param="offload.weights",
        )
    if settings.checkpoint or settings.mlp_tile or settings.attention_tile:
        decoder = getattr(model, "trunk", model)  # a value model's blocks are its trunk's
        apply_longseq(decoder, settings, recipe.run.output, num_shards > 1, weights)
    return recipe


def _shape_of(model: Any) -> Shape:
    return foreign_shape(model) if isinstance(model, HFDecoder) else Shape.of(model.config)
