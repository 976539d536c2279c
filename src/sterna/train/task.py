"""What the kinds of training differ in: the model, the loss and how weights are written.

`sft`, `pretrain` and `distill` are tasks; everything else of a run is the same code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from sterna.core.errors import ConfigError
from sterna.model.decoder import Decoder
from sterna.parallel.mesh import Mesh
from sterna.train.config import Recipe
from sterna.train.hooks import Hook
from sterna.train.rowloss import RowLoss
from sterna.train.step import Loss


@dataclass(frozen=True, slots=True)
class Weights:
    """A model as files: checkpoint tensors, its config.json, and other files by name.

    Without a config there are no tensors, and the other files are all.
    """

    tensors: Iterable[tuple[str, Tensor]]
    config: dict[str, Any]
    files: Mapping[str, str | bytes]


def plain_form(decoder: Decoder, path: Path) -> Decoder:
    """The decoder itself. ConfigError for a SwiftKV one, which only its distillation trains."""
    if decoder.config.swiftkv is not None:
        raise ConfigError(
            f"{path} is a SwiftKV model, which is not trained further; train the model that it "
            "was made of and convert the result",
            param="model.path",
        )
    return decoder


class Task(Protocol):
    """One kind of training."""

    def build(self, recipe: Recipe, mesh: Mesh, source: Path | None) -> nn.Module:
        """The model on the mesh's device, frozen where it is not trained, cut over the ranks.

        `source`: the checkpoint folder of a run that is continued, None = from the recipe.
        """
        ...

    def loss(self, recipe: Recipe) -> Loss | RowLoss:
        """The sum of a micro-batch's losses over its valid targets. Called once, after `build`."""
        ...

    def weights(self, model: nn.Module) -> Weights:
        """What a checkpoint holds of the model, so that `source` reads it. All ranks call it."""
        ...

    def final(self, model: nn.Module) -> Weights | None:
        """The whole model where checkpoints hold only a part of it; else None.

        Called once, at the end: the model may be changed. All ranks call it.
        """
        ...

    def hooks(self, recipe: Recipe) -> Sequence[Hook]:
        """What this kind does at evals and at the end, before the built-in hooks."""
        ...
