"""One model over the ranks of a mesh: attention over sp, weights over dp x sp."""

from __future__ import annotations

from typing import Any

from sterna.parallel.config import ParallelConfig
from sterna.parallel.fsdp import shard_model
from sterna.parallel.mesh import Axis, Mesh
from sterna.parallel.ulysses import plan_attention


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
