"""What a trainer is put together from; `build.py` makes it, `trainer.py` runs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from sterna.data.counts import Counts
from sterna.data.pack import PackedRow
from sterna.parallel.mesh import Axis, Mesh
from sterna.train.config import Recipe
from sterna.train.ema import Ema
from sterna.train.flops import FlopCounter
from sterna.train.hooks import Hook
from sterna.train.optim import AdamW
from sterna.train.step import TrainStep
from sterna.train.task import Task


class RowLoader(Protocol):
    """Rows in an order that a saved position continues exactly."""

    def __iter__(self) -> Iterator[PackedRow]:
        """This rank's next rows."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-able position: the row after the last one that was taken."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        ...

    @property
    def counts(self) -> Counts:
        """What became of the rows of the files so far."""
        ...

    def close(self) -> None:
        """End its threads."""
        ...


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything of one run on this rank."""

    recipe: Recipe
    mesh: Mesh
    owns_mesh: bool  # whether torch.distributed was started for this run, and ends with it
    shards: Axis  # over which the shards of one weight lie; of size 1 where each rank has all
    task: Task
    model: nn.Module
    step: TrainStep
    optimizer: AdamW
    ema: Ema | None
    loader: RowLoader
    eval_rows: Sequence[PackedRow]
    flops: FlopCounter
    peak_flops: float  # FLOP/s of all ranks together, for MFU
    hooks: Sequence[Hook]
    horizon: int  # steps of the schedule
    files: dict[str, str]  # tokenizer files of the saved model, by name
    source: Path | None  # the checkpoint that is continued


def trained(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Names and weights that are trained, in a fixed order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
