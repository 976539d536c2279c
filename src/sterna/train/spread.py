"""One model on its machines: attention spread over sp, weights over dp x sp, rows that are long."""

from __future__ import annotations

from typing import Any

from sterna.core.errors import ConfigError
from sterna.model.decoder import Decoder
from sterna.parallel.config import ParallelConfig
from sterna.parallel.fsdp import shard_model
from sterna.parallel.mesh import Axis, Mesh
from sterna.parallel.ulysses import plan_attention
from sterna.train.autoplan import chosen, is_chosen
from sterna.train.config import Recipe
from sterna.train.longseq.apply import apply_longseq
from sterna.train.longseq.config import LongseqSection


def spread(model: Any, config: ParallelConfig, mesh: Mesh) -> Axis:
    """Prepare `model` for its rank, in place; does nothing on one rank. All ranks call it.

    Returns the axis over which one weight's shards lie, of size 1 where each rank has all of it.
    ConfigError for a parallel.ulysses that the heads do not allow.
    """
    plan = plan_attention(mesh, int(model.config.num_attention_heads), config.ulysses)
    if plan is not None:
        model.set_parallel(plan)
    if mesh.data.size == 1 or config.shard == "none":
        return Axis("whole")
    shard_model(model, list(model.layers), mesh)
    return mesh.data


def use_longseq(model: Any, recipe: Recipe, mesh: Mesh, num_shards: int) -> Recipe:
    """Switch on the recipe's checkpoints and tiles; the recipe with what longseq.auto chose.

    All ranks call it. ConfigError for a model behind transformers, or for what FSDP2 does not
    allow.
    """
    settings = recipe.longseq
    if settings.auto and not is_chosen(settings) and isinstance(model, Decoder):
        settings = chosen(recipe, model.config, mesh, num_shards)
        recipe = recipe.model_copy(update={"longseq": settings})
    if settings == LongseqSection.model_validate({"head_rows": settings.head_rows}):
        return recipe
    if not isinstance(model, Decoder):
        raise ConfigError(
            "[longseq] checkpoints, tiles and auto are those of native models; this one runs "
            "behind transformers. Leave them out, or choose a model of a native family",
            param="longseq",
        )
    apply_longseq(model, settings, recipe.run.output, num_shards > 1)
    return recipe
