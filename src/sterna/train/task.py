"""What the kinds of training differ in: the model, the loss and how weights are written.

`sft`, `pretrain` and `distill` are tasks; everything else of a run is the same code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from sterna.parallel.mesh import Mesh
from sterna.train.config import Recipe
from sterna.train.step import Loss


@dataclass(frozen=True, slots=True)
class Weights:
    """A model as files: checkpoint tensors, its config.json, and other text files by name."""

    tensors: Iterable[tuple[str, Tensor]]
    config: dict[str, Any]
    files: dict[str, str]


class Task(Protocol):
    """One kind of training."""

    def build(self, recipe: Recipe, mesh: Mesh, source: Path | None) -> nn.Module:
        """The model on the mesh's device, frozen where it is not trained, cut over the ranks.

        `source`: the checkpoint folder of a run that is continued, None = from the recipe.
        """
        ...

    def loss(self) -> Loss:
        """The sum of a micro-batch's losses over its valid targets."""
        ...

    def weights(self, model: nn.Module) -> Weights:
        """What to write of the model, so that `source` and `sterna chat FOLDER` read it."""
        ...
