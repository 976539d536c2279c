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
from dataclasses import dataclass
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

    loss: float  # mean over valid targets
    num_targets: int
    num_tokens: int
    bad_micro: int | None = None  # this rank's first micro-batch whose loss is not finite


class TrainStep:
    """Runs forward and backward of a step's rows; `gradients` then has what they gave."""

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        micro_rows: int = 1,
        loss: Loss = cross_entropy,
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
        factor = self._mesh.data.size / num_targets
        micros = list(self._micros(rows))
        self.gradients.begin(len(micros))
        sums = [self._micro(micro, factor, step, i) for i, micro in enumerate(micros)]
        if not self._is_sharded:
            self.gradients.average(self._mesh.data)
        return self._sum_up(torch.stack(sums), num_targets, num_tokens)

    @torch.no_grad()
    def evaluate(self, rows: Sequence[PackedRow]) -> tuple[float, int]:
        """(sum of the losses, number of valid targets) over all ranks, without gradients."""
        num_targets, _ = (int(n) for n in self._counts(rows))
        sums = [self._loss(self._model, *self._inputs(m)).double() for m in self._micros(rows)]
        release(self._model)
        return float(total(torch.stack(sums).sum(), self._mesh.data)), num_targets

    def _micro(self, rows: Sequence[PackedRow], factor: float, step: int, micro: int) -> Tensor:
        batch, targets = self._inputs(rows)
        if self._neftune is not None:
            self._neftune.arm(batch, step, micro, self._mesh.sp)
        loss = self._loss(self._model, batch, targets)
        torch.autograd.backward(loss * factor)
        self.gradients.add()
        return loss.detach().double()

    def _sum_up(self, sums: Tensor, num_targets: int, num_tokens: int) -> StepLoss:
        loss = float(total(sums.sum(), self._mesh.data)) / num_targets
        bad = (~sums.isfinite()).nonzero().flatten().tolist()
        return StepLoss(loss, num_targets, num_tokens, bad[0] if bad else None)

    def _counts(self, rows: Sequence[PackedRow]) -> Tensor:
        """[valid targets, tokens] over the ranks with different rows."""
        own = [sum(row.num_targets for row in rows), sum(len(row.tokens) for row in rows)]
        return total(torch.tensor(own, device=self._mesh.device), self._mesh.dp)

    def _micros(self, rows: Sequence[PackedRow]) -> Iterator[Sequence[PackedRow]]:
        for begin in range(0, len(rows), self._micro_rows):
            yield rows[begin : begin + self._micro_rows]

    def _inputs(self, rows: Sequence[PackedRow]) -> tuple[Batch, Tensor]:
        """The micro-batch, or this sp rank's slice of it."""
        sp = self._mesh.sp
        return shard_batch(*as_batch(rows, self._mesh.device, sp.size), sp)


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
