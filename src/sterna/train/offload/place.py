"""What a run moves off its device: `offload(recipe, model, mesh)`, refusals first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sterna.core.errors import ConfigError
from sterna.model.decoder import Decoder
from sterna.parallel.mesh import Mesh
from sterna.train.config import Recipe
from sterna.train.offload.homes import Home, Kept, MemoryHome, TierHome, new_home
from sterna.train.offload.weights import LEAST, WeightTier


@dataclass(frozen=True, slots=True)
class Offload:
    """The home of optimizer states, and the weights that are away."""

    home: Home = field(default_factory=MemoryHome)
    weights: WeightTier | None = None
    places: Mapping[nn.Parameter, Kept] = field(default_factory=dict)  # updated at home


def offload(recipe: Recipe, model: Any, mesh: Mesh) -> Offload:
    """Where states go, after moving the weights there; `use_longseq` has blocks fetch them.

    ConfigError for what cannot be proven: several ranks, models behind transformers, distillation,
    trained weights in another tier than their states. TrainError when the disk has no room.
    """
    settings = recipe.offload
    if settings.states == settings.weights == "memory":
        return Offload()
    _check(recipe, model, mesh)
    folder = settings.folder or recipe.run.output
    states = new_home(settings.states, mesh.device, folder)
    if settings.weights == "memory":
        return Offload(states)
    is_adapter = recipe.adapter is not None
    home = states if settings.weights == settings.states else None
    home = home or new_home(settings.weights, mesh.device, folder)
    assert isinstance(home, TierHome)

    def is_wanted(tensor: Tensor) -> bool:
        return tensor.numel() >= LEAST and not (is_adapter and tensor.requires_grad)

    weights = WeightTier(list(model.layers), home, is_wanted)
    return Offload(states, weights, {} if is_adapter else weights.places)


def _check(recipe: Recipe, model: Any, mesh: Mesh) -> None:
    settings = recipe.offload
    if mesh.world > 1:
        raise ConfigError(
            f"[offload] is that of one device, this run has {mesh.world} ranks: FSDP2 cuts their "
            "weights and states already. Leave [offload] out, or start one rank",
            param="offload",
        )
    if settings.weights == "memory":
        return
    if not isinstance(model, Decoder) or recipe.kind == "distill":
        raise ConfigError(
            "offload.weights moves the blocks of native models in sft and pretrain; this "
            + ("run distils" if recipe.kind == "distill" else "model runs behind transformers")
            + ". Set it to memory (offload.states works)",
            param="offload.weights",
        )
    if recipe.adapter is None and settings.weights != settings.states:
        raise ConfigError(
            f"offload.weights is {settings.weights}, offload.states {settings.states}: weights are "
            "updated where their states are; give both the same tier",
            param="offload.weights",
        )
