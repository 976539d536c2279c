"""One optimizer step's gradients: packed rows -> Batch -> hidden states -> loss -> backward.

The loss is exact whatever the cut into micro-batches and ranks: with s the sum of token losses of
one micro-batch and N the valid targets of the whole step over all ranks, counted before, each
micro-batch differentiates

    s * W / N      W = the number of data ranks, since the reducer averages over them

so the gradient is that of (sum of all token losses) / N. A rank or micro-batch without a valid
target adds zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sterna.core.errors import TrainError
from sterna.data.pack import PackedRow, filler
from sterna.model.batch import Batch
from sterna.parallel.collectives import total
from sterna.parallel.fsdp import release
from sterna.parallel.mesh import Mesh
from sterna.parallel.shard_rows import shard_batch
from sterna.train.gradients import Gradients
from sterna.train.longseq.head import chunked_cross_entropy
from sterna.train.neftune import Neftune
from sterna.train.rowloss import RowLoss


class TrainModel(Protocol):
    """What the trainer needs of a model: native decoders and adapters of others have it."""

    config: Any

    def hidden(self, batch: Batch) -> Tensor:
        """Final normed hidden states [T, D]."""
        ...

    def head_weight(self) -> Tensor:
        """[V, D], tied or not."""
        ...

    def head_bias(self) -> Tensor | None:
        """[V], or None."""
        ...


# (model, batch, targets [T] int64) -> sum of the losses of this micro-batch's valid targets
Loss = Callable[[Any, Batch, Tensor], Tensor]
# A micro-batch's loss, and the sums of a RowLoss's figures.
Sums = tuple[Tensor, Tensor | None]


def cross_entropy(
    model: TrainModel,
    batch: Batch,
    targets: Tensor,
    *,
    chunk_rows: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Next-token cross entropy, summed over valid targets.

    Logits exist for `chunk_rows` rows at a time, None = as many as the head's byte limit allows.
    Label smoothing and z-loss belong to training: without gradients (an eval) they are left out.
    """
    is_training = torch.is_grad_enabled()
    return chunked_cross_entropy(
        model.hidden(batch),
        model.head_weight(),
        targets,
        softcap=float(getattr(model.config, "logits_softcap", 0.0)),
        bias=model.head_bias(),
        chunk_rows=chunk_rows,
        label_smoothing=label_smoothing if is_training else 0.0,
        z_loss=z_loss if is_training else 0.0,
    )


@dataclass(frozen=True, slots=True)
class StepLoss:
    """The loss of one step over all ranks."""

    loss: float  # mean over valid targets, or over what a RowLoss counts
    num_targets: int
    num_tokens: int
    bad_micro: int | None = None  # this rank's first micro-batch whose loss is not finite
    figures: dict[str, float] = field(default_factory=dict)  # of a RowLoss


class TrainStep:
    """Runs forward and backward of a step's rows; `gradients` then has what they gave."""

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        micro_rows: int = 1,
        loss: Loss | RowLoss = cross_entropy,
        neftune: Neftune | None = None,
        is_sharded: bool = False,
    ) -> None:
        """`is_sharded`: FSDP2 reduces the gradients; else they are averaged here, once a step."""
        self._model = model
        self._mesh = mesh
        self._micro_rows = micro_rows
        self._loss = loss
        self._neftune = neftune
        self._is_sharded = is_sharded
        self.gradients = Gradients(model.parameters())

    def run(self, rows: Sequence[PackedRow], step: int = 0) -> StepLoss:
        """Gradients of this rank's rows. TrainError when no rank has a valid target."""
        counts = self._counts(rows)
        num_targets, num_tokens = (int(n) for n in counts)
        if num_targets == 0:
            raise TrainError(
                f"none of the step's {num_tokens} tokens is trained; check data.train_on and that "
                "the samples have answers"
            )
        if isinstance(self._loss, RowLoss):
            self._loss.prepare(self._model, rows, self._mesh)
        factor = self._mesh.data.size / num_targets
        micros = list(self._micros(rows))
        self.gradients.begin(len(micros))
        sums = [self._micro(micro, factor, step, i) for i, micro in enumerate(micros)]
        if not self._is_sharded:
            self.gradients.average(self._mesh.data)
        return self._sum_up(sums, num_targets, num_tokens)

    @torch.no_grad()
    def evaluate(self, rows: Sequence[PackedRow]) -> StepLoss:
        """The loss over all ranks, without gradients; 0 where nothing is counted."""
        num_targets, num_tokens = (int(n) for n in self._counts(rows))
        if isinstance(self._loss, RowLoss):
            self._loss.prepare(self._model, rows, self._mesh)
        sums = [self._detached(*self._losses(micro)) for micro in self._micros(rows)]
        release(self._model)
        return self._sum_up(sums, num_targets, num_tokens)

    def _micro(self, rows: Sequence[PackedRow], factor: float, step: int, micro: int) -> Sums:
        loss, figures = self._losses(rows, (step, micro))
        torch.autograd.backward(loss * factor)
        self.gradients.add()
        return self._detached(loss, figures)

    def _losses(
        self, rows: Sequence[PackedRow], noise: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The sum of a micro-batch's losses, and the figures' sums; `noise`: step and micro."""
        if isinstance(self._loss, RowLoss):
            return self._loss(self._model, rows)
        batch, targets = self._inputs(rows)
        if self._neftune is not None and noise is not None:
            self._neftune.arm(batch, *noise, self._mesh.sp)
        return self._loss(self._model, batch, targets), None

    def _detached(self, loss: Tensor, figures: Tensor | None) -> Sums:
        return loss.detach().double(), figures

    def _sum_up(self, sums: Sequence[Sums], num_targets: int, num_tokens: int) -> StepLoss:
        losses = torch.stack([loss for loss, _ in sums])
        loss = float(total(losses.sum(), self._mesh.data)) / max(1, num_targets)
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        first = bad[0] if bad else None
        return StepLoss(loss, num_targets, num_tokens, first, self._figures(sums))

    def _figures(self, sums: Sequence[Sums]) -> dict[str, float]:
        if not isinstance(self._loss, RowLoss):
            return {}
        parts = [figures for _, figures in sums if figures is not None]
        table = total(torch.stack(parts).sum(0), self._mesh.data).tolist()
        means = {
            name: value / count
            for name, (value, count) in zip(self._loss.names, table, strict=True)
            if count
        }
        return self._loss.figures(means)

    def _counts(self, rows: Sequence[PackedRow]) -> Tensor:
        """[valid targets, tokens] over the ranks with different rows."""
        counted = self._loss.count if isinstance(self._loss, RowLoss) else _num_targets
        own = [sum(map(counted, rows)), sum(len(row.tokens) for row in rows)]
        return total(torch.tensor(own, device=self._mesh.device), self._mesh.dp)

    def _micros(self, rows: Sequence[PackedRow]) -> Iterator[Sequence[PackedRow]]:
        for begin in range(0, len(rows), self._micro_rows):
            yield rows[begin : begin + self._micro_rows]

    def _inputs(self, rows: Sequence[PackedRow]) -> tuple[Batch, Tensor]:
        """The micro-batch, or this sp rank's slice of it."""
        sp = self._mesh.sp
        return shard_batch(*as_batch(rows, self._mesh.device, sp.size), sp)


def _num_targets(row: PackedRow) -> int:
    return row.num_targets


def as_batch(
    rows: Sequence[PackedRow], device: torch.device, least: int = 1
) -> tuple[Batch, Tensor]:
    """Rows side by side as one flat Batch of at least `least` tokens, and the targets [T] int64."""
    missing = least - sum(len(row.tokens) for row in rows)
    rows = [*rows, *[filler()] * max(0, missing)]
    lengths = np.concatenate([np.diff(row.starts) for row in rows])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate([row.tokens for row in rows])
    positions = np.concatenate([row.positions for row in rows])
    batch = Batch(
        tokens=_int32(tokens, device),
        positions=_int32(positions, device),
        query_starts=_int32(starts, device),
        context_lens=_int32(lengths, device),
    )
    targets = np.concatenate([row.targets for row in rows]).astype(np.int64)
    return batch, torch.from_numpy(targets).to(device)


def _int32(values: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(device)
