"""A trial: a few optimizer steps of a model on given rows, alike on one process and on many.

The parity certificate and the correctness matrix both compare trials: the reference is the plain
one-process trial, the other has the features in question. Nothing here is fast or clever, so that
there is little to be wrong in the reference: logits are whole, gradients are kept whole.

Errors are relative: max |a - b| / max |b| of each tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sterna.data.pack import PackedRow
from sterna.model.batch import Batch
from sterna.model.hf import HFDecoder
from sterna.parallel.collectives import total
from sterna.parallel.config import ParallelConfig
from sterna.parallel.fsdp import average_gradients, full, local
from sterna.parallel.mesh import Mesh, open_mesh
from sterna.parallel.shard_rows import IGNORE, shard_batch
from sterna.train.adapter import add_adapter
from sterna.train.adapter_config import AdapterConfig
from sterna.train.longseq.apply import apply_longseq
from sterna.train.longseq.config import LongseqSection
from sterna.train.longseq.foreign_proof import experts_of
from sterna.train.longseq.head import chunked_cross_entropy
from sterna.train.offload.homes import TierHome, new_home
from sterna.train.offload.weights import WeightTier
from sterna.train.spread import shards_of, spread
from sterna.train.step import TrainStep
from sterna.train.trialmodel import TrialModel, make_model

# AdamW divides by the gradient's own size, so with the usual eps of 1e-8 a weight whose gradient is
# only rounding moves by up to the learning rate either way. Clipped elements are near 1e-3 here.
LR, CLIP, BETAS, EPS = 1e-3, 0.5, (0.9, 0.95), 1e-4


# (model, batch, targets [T]) -> sum of the losses of the valid targets
LossOf = Callable[[Any, Batch, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row: document lengths, and which positions are trained."""

    documents: tuple[int, ...]
    trained: tuple[int, int] = (0, 2**31)  # positions [low, high) that have a target
    drop: float = 0.3  # share of these without a target, by seed


@dataclass(frozen=True, slots=True)
class Trial:
    """What is run. `rows` is one optimizer step's; row i belongs to dp rank i % dp."""

    rows: tuple[Row, ...]
    model: TrialModel
    dtype: str = "float64"
    parallel: dict[str, Any] = field(default_factory=dict)
    chunked_head: int | None = None  # the trainer's step, with that many rows of logits at once;
    # None = whole logits, in the plain loop below
    longseq: dict[str, Any] = field(default_factory=dict)  # LongseqSection
    steps: int = 3
    frozen: tuple[str, ...] = ()  # parts of names of weights that are not trained
    adapter: dict[str, Any] | None = None  # AdapterConfig; trained instead of the weights
    loss: dict[str, Any] = field(default_factory=dict)  # LossSection
    offload_folder: str = ""  # the blocks' weights wait in a file there; needs longseq.checkpoint
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """Of one trial, on the first rank: whole tensors by parameter name."""

    loss: float
    eval_loss: float
    grads: dict[str, Tensor]
    weights: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Errors:
    """Largest relative errors against the reference, and the tensor each is in."""

    loss: float
    eval_loss: float
    grad: float
    worst_grad: str
    weight: float
    worst_weight: str

    @property
    def worst(self) -> float:
        """The largest of all."""
        return max(self.loss, self.eval_loss, self.grad, self.weight)


def run_trial(trial: Trial) -> Result | None:
    """Run on this rank; the result on the first rank, None on others."""
    mesh = open_mesh(ParallelConfig(**trial.parallel))
    model, is_cut = build_model(trial, mesh)
    weights = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for _, p in weights], lr=LR, betas=BETAS, eps=EPS)
    vocab = int(model.config.vocab_size)
    rows = [r for i, r in enumerate(make_rows(trial, vocab)) if i % mesh.dp.size == mesh.dp.rank]
    eval_loss, gradients = _procedures(trial, model, rows, mesh, is_cut)
    first: tuple[float, dict[str, Tensor]] | None = None
    for _ in range(trial.steps):
        optimizer.zero_grad(set_to_none=True)
        loss = gradients()
        if first is None:
            first = loss, _whole({n: p.grad for n, p in weights if p.grad is not None})
        _clip([p for _, p in weights], mesh, is_cut)
        optimizer.step()
    after = _whole(dict(weights))
    assert first is not None
    return Result(first[0], eval_loss, first[1], after) if mesh.is_main else None


def compare(reference: Result, other: Result) -> Errors:
    """The errors of a trial. A gradient that one of them lacks is an error of 1 (or its size)."""
    grads = {n: _error(other.grads.get(n), g) for n, g in reference.grads.items()}
    grads |= dict.fromkeys(other.grads.keys() - reference.grads.keys(), 1.0)
    weights = {n: _error(other.weights.get(n), w) for n, w in reference.weights.items()}
    worst_grad, worst_weight = (
        max(grads, key=grads.__getitem__),
        max(weights, key=weights.__getitem__),
    )
    return Errors(
        loss=abs(other.loss - reference.loss) / abs(reference.loss),
        eval_loss=abs(other.eval_loss - reference.eval_loss) / abs(reference.eval_loss),
        grad=grads[worst_grad],
        worst_grad=worst_grad,
        weight=weights[worst_weight],
        worst_weight=worst_weight,
    )


def build_model(trial: Trial, mesh: Mesh) -> tuple[Any, bool]:
    """The model with its features on, spread over the mesh, and whether its weights are cut."""
    model = make_model(trial.model, getattr(torch, trial.dtype), trial.seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in trial.frozen))
    if trial.adapter is not None:
        add_adapter(model, AdapterConfig(**trial.adapter), trial.seed)
        _fill_zeros(model.to(getattr(torch, trial.dtype)), trial.seed)
    parallel = ParallelConfig(**trial.parallel)
    is_cut = shards_of(parallel, mesh).size > 1
    if trial.longseq:
        settings = LongseqSection(**trial.longseq)
        if settings.auto and isinstance(model, HFDecoder) and experts_of(model):
            settings = settings.model_copy(update={"mlp_tile": 0})  # as the planner does
        apply_longseq(model, settings, is_sharded=is_cut, weights=_offloaded(trial, model))
    spread(model, parallel, mesh)
    return model, is_cut


def _offloaded(trial: Trial, model: Any) -> WeightTier | None:
    """The blocks' weights moved to the disk, as `offload.weights` does."""
    if not trial.offload_folder:
        return None
    home = new_home("disk", torch.device("cpu"), Path(trial.offload_folder))
    assert isinstance(home, TierHome)
    is_adapter = trial.adapter is not None
    return WeightTier(
        list(model.layers),
        home,
        lambda tensor: tensor.dim() > 1 and not (is_adapter and tensor.requires_grad),
    )


def _fill_zeros(model: nn.Module, seed: int) -> None:
    """Trained weights that start at zero hide those they multiply: B of an adapter hides A."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(noise * 0.1)


def make_rows(trial: Trial, vocab: int) -> list[tuple[Batch, Tensor]]:
    """Batches and targets [T] of the step's rows: random tokens, targets shifted in documents."""
    generator = torch.Generator().manual_seed(trial.seed + 1)
    return [_make_row(row, vocab, generator) for row in trial.rows]


def _make_row(row: Row, vocab: int, generator: torch.Generator) -> tuple[Batch, Tensor]:
    borders = list(itertools.accumulate(row.documents, initial=0))
    size = borders[-1]
    tokens = torch.randint(0, vocab, (size,), generator=generator)
    targets = torch.cat([tokens[1:], tokens[:1]])
    targets[[b - 1 for b in borders[1:]]] = IGNORE
    place = torch.arange(size)
    out = (torch.rand(size, generator=generator) < row.drop) | (place < row.trained[0])
    targets[out | (place >= row.trained[1])] = IGNORE
    positions = torch.cat([torch.arange(n) for n in row.documents])
    starts, lens = torch.tensor(borders), torch.tensor(row.documents)
    return Batch(tokens.int(), positions.int(), starts.int(), lens.int()), targets


def _procedures(
    trial: Trial, model: Any, rows: list[tuple[Batch, Tensor]], mesh: Mesh, is_cut: bool
) -> tuple[float, Callable[[], float]]:
    """The eval loss, and what computes a step's gradients and returns its loss."""
    if trial.chunked_head is None:
        loss_of: LossOf = partial(whole_loss, **trial.loss)
        eval_loss = _evaluate(model, loss_of, rows, mesh)
        return eval_loss, partial(accumulate, model, loss_of, rows, mesh, is_cut)
    loss_of = partial(_chunked_loss, chunk_rows=trial.chunked_head, **trial.loss)
    step = TrainStep(model, mesh, loss=loss_of, is_sharded=is_cut)
    packed = [_packed(*row) for row in rows]
    return step.evaluate(packed).loss, lambda: step.run(packed).loss


def _packed(batch: Batch, targets: Tensor) -> PackedRow:
    ints = (batch.tokens, targets.int(), batch.positions, batch.query_starts)
    tokens, shifted, positions, starts = (x.numpy() for x in ints)
    return PackedRow(tokens, shifted, positions, starts, (0,) * (len(starts) - 1))


def _chunked_loss(
    model: Any, batch: Batch, targets: Tensor, chunk_rows: int, **penalties: float
) -> Tensor:
    hidden = model.hidden(batch)
    softcap = float(getattr(model.config, "logits_softcap", 0.0))
    return chunked_cross_entropy(
        hidden,
        model.head_weight(),
        targets,
        softcap=softcap,
        bias=model.head_bias(),
        chunk_rows=chunk_rows,
        **penalties,
    )


def whole_loss(
    model: Any,
    batch: Batch,
    targets: Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum of the cross entropies of a batch's valid targets, from whole logits."""
    softcap = float(getattr(model.config, "logits_softcap", 0.0))
    hidden = model.hidden(batch)
    weight, bias = model.head_weight(), model.head_bias()  # whole only once `hidden` has run
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    log_sums = logits[targets != IGNORE].logsumexp(1)
    loss: Tensor = F.cross_entropy(
        logits,
        targets,
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return loss.add(log_sums.square().sum(), alpha=z_loss)


def accumulate(
    model: Any,
    loss_of: LossOf,
    rows: Sequence[tuple[Batch, Tensor]],
    mesh: Mesh,
    is_cut: bool,
) -> float:
    """Gradients of the step's mean loss over all valid targets; that loss over all ranks."""
    count = _count(rows, mesh)
    loss = torch.zeros((), dtype=torch.float64)
    for batch, targets in rows:
        part = loss_of(model, *shard_batch(batch, targets, mesh.sp))
        torch.autograd.backward(part * (mesh.data.size / count))
        loss += part.detach().double()
    if not is_cut:
        average_gradients([p for p in model.parameters() if p.requires_grad], mesh.data)
    return float(total(loss, mesh.data)) / count


@torch.no_grad()
def _evaluate(
    model: Any, loss_of: LossOf, rows: Sequence[tuple[Batch, Tensor]], mesh: Mesh
) -> float:
    parts = [loss_of(model, *shard_batch(*row, mesh.sp)).double() for row in rows]
    return float(total(torch.stack(parts).sum(), mesh.data)) / _count(rows, mesh)


def _count(rows: Sequence[tuple[Batch, Tensor]], mesh: Mesh) -> int:
    own = sum(int((targets != IGNORE).sum()) for _, targets in rows)
    return int(total(torch.tensor(own), mesh.dp))


def _clip(parameters: list[nn.Parameter], mesh: Mesh, is_cut: bool) -> None:
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    square = torch.stack([g.double().pow(2).sum() for g in grads]).sum()
    norm = float(total(square, mesh.data) if is_cut else square) ** 0.5
    if norm > CLIP:
        for grad in grads:
            grad.mul_(CLIP / norm)


def _whole(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: full(tensor.detach()).clone() for name, tensor in tensors.items()}


def _error(value: Tensor | None, reference: Tensor) -> float:
    if value is None:
        return float(reference.abs().max() > 0)
    scale = float(reference.abs().max())
    difference = float((value.double() - reference.double()).abs().max())
    return difference / scale if scale > 0 else difference
