"""The one head op of training: from hidden states to losses without ever holding [T, V] logits.

    z = softcap(scale * h W^T + b)                       a chunk of rows at a time, float32
    cross entropy   sum over valid t of lse(z_t) - z_t[y_t]
                      + s (z_t[y_t] - mean z_t)     label smoothing s (arXiv 1512.00567, section 7)
                      + c lse(z_t)^2                z-loss c (PaLM, arXiv 2204.02311, section 5)
    log-probs       z_t[y_t] - lse(z_t), with the entropy lse - sum p z
    KL              sum over rows of KL(softmax(z_teacher / T) || softmax(z_student / T))

Rows whose target is IGNORE (or that a mask leaves out) are dropped before their logits are
computed. z comes from `ops.logits`, the kernel of the engine, on the weight packed once a call; the
log-probs of `chunked_logprobs` are those of `kernels/scores.py`, the sampler's own function, so on
the CPU a training log-prob is the engine's to the bit (rounded to float32).

A sum (cross entropy, KL) knows its gradient but for one factor, so its forward computes it while
the logits are there, if and only if a gradient is asked for, and backward multiplies the gradients
of hidden, weight and bias by the upstream one. A value a row (log-prob, entropy) does not: its
backward computes each chunk's logits again: with upstream gradients g (log-prob) and k (entropy)

    d z_j = (g (1[j = y] - p_j) - k p_j (log p_j + H)) / temperature

that of the cross entropy is d z_j = p_j (1 + 2 c lse) - (1 - s) 1[j = y] - s / V. The weight's
gradient is summed over chunks in float32.

The road not taken: one loop over vocabulary tiles too (no logits at all). It computes the logits
twice, and a chunk of them is small beside the weight's float32 gradient already.

Legend: T tokens, R rows in use, r rows of a chunk, V vocabulary, D hidden_size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sterna.core.errors import KernelError
from sterna.kernels.score_gradient import can_differentiate, row_gradient
from sterna.kernels.scores import PLAIN, Distribution, score
from sterna.train.longseq.chunks import (
    Gradients,
    Head,
    HeadSettings,
    as_inputs,
    check,
    make_head,
    split_rows,
    valid_rows,
)

# Rows of logits at a time on a CPU where nothing else needs more: 50 MB of 49,152 tokens, most of
# them still in the cache when they are read.
FEW_ROWS = 256


class _SumLoss(torch.autograd.Function):
    """A scalar sum whose gradients were computed with it; backward scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Any, work: Any) -> Tensor:
        found: tuple[Tensor, tuple[Tensor | None, ...]] = work(ctx.needs_input_grad[:3])
        loss, ctx.grads = found
        ctx.like = [None if x is None else x.new_empty(0) for x in (hidden, weight, bias)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = tuple(None if g is None else g * upstream.to(g.dtype) for g in ctx.grads)
        return (*as_inputs(scaled, ctx.like), None)


def sum_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, work: Any) -> Tensor:
    """The scalar that `work(wants)` returns beside its gradients of (hidden, weight, bias)."""
    tensors = (hidden, weight, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        apply: Any = _SumLoss.apply
        loss: Tensor = apply(hidden, weight, bias, work)
        return loss
    total: Tensor = work((False, False, False))[0]
    return total


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float = 0.0,
    scale: float = 1.0,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """hidden [T, D], weight [V, D], targets [T] (IGNORE = no loss) -> SUM over valid tokens.

    float32 scalar (float64 for float64 hidden states), with a graph also when no token is valid.
    `label_smoothing` s and `z_loss` c are those of the formula above.
    Raises KernelError for shapes that do not fit, a packed or quantised weight, a target beyond V.
    """
    check(hidden, weight, bias, targets)
    settings = HeadSettings(softcap, scale, chunk_rows)

    def work(wants: tuple[bool, ...]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        penalty = (label_smoothing, z_loss)
        return _cross_entropy(hidden.detach(), weight, bias, targets, settings, penalty, wants)

    return sum_loss(hidden, weight, bias, work)


@torch.no_grad()
def _cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    settings: HeadSettings,
    penalty: tuple[float, float],
    wants: tuple[bool, ...],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    smoothing, z_loss = penalty
    head = make_head(weight, bias, settings)
    grads = Gradients(head, hidden, wants)
    total = hidden.new_zeros((), dtype=torch.float64)
    for rows in split_rows(valid_rows(targets, len(weight)), len(weight), settings):
        part, wanted = hidden.index_select(0, rows), targets[rows].long()[:, None]
        z = head.logits(part)
        kept = z.clone() if settings.softcap > 0 and any(wants) else None
        chosen = z.gather(1, wanted).double()
        if smoothing:
            total += smoothing * (chosen[:, 0] - z.mean(1, dtype=torch.float64)).sum()
        log_sum, weights = _soften(z)
        total += (log_sum[:, None] - chosen).sum() + z_loss * log_sum.square().sum()
        if any(wants):
            z.mul_(weights * (1 + 2 * z_loss * log_sum[:, None]).to(z.dtype) if z_loss else weights)
            z.scatter_add_(1, wanted, torch.full_like(wanted, smoothing - 1.0, dtype=z.dtype))
            if smoothing:
                z -= smoothing / len(weight)
            grads.add(rows, part, head.uncap(z, kept))
        del z  # or the next chunk's logits would lie beside these
    return total.to(grads.sum_dtype), grads.take()


def _soften(z: Tensor) -> tuple[Tensor, Tensor]:
    """In place z := exp(z - max); returns lse [r] float64 and 1 / sum [r, 1] (p = z / sum)."""
    top = z.amax(1, keepdim=True)
    total = z.sub_(top).exp_().sum(1, keepdim=True)
    lse = top.double() + total.double().log()
    return lse[:, 0], total.reciprocal()


def chunked_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    *,
    softcap: float = 0.0,
    scale: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """SUM over the rows of `mask` [T] bool (None = all) of KL(teacher || student) at `temperature`.

    The teacher's hidden size may differ, its vocabulary must not; it gets no gradient. The usual
    factor temperature^2 is the caller's. Raises KernelError as `chunked_cross_entropy`.
    """
    check(hidden, weight, bias, mask)
    check(teacher_hidden, teacher_weight, teacher_bias, mask)
    if weight.shape[0] != teacher_weight.shape[0] or len(hidden) != len(teacher_hidden):
        raise KernelError(
            f"student logits [{len(hidden)}, {weight.shape[0]}] and teacher logits "
            f"[{len(teacher_hidden)}, {teacher_weight.shape[0]}] must have one shape"
        )
    settings = HeadSettings(softcap, scale, chunk_rows)
    marks = hidden.new_ones(len(hidden), dtype=torch.bool) if mask is None else mask

    @torch.no_grad()
    def work(wants: tuple[bool, ...]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        student = make_head(weight, bias, settings)
        teacher = make_head(teacher_weight, teacher_bias, settings)
        grads = Gradients(student, hidden.detach(), wants)
        total = hidden.new_zeros((), dtype=torch.float64)
        for rows in split_rows(marks.nonzero()[:, 0], len(weight), settings):
            part = hidden.detach().index_select(0, rows)
            taught = teacher.logits(teacher_hidden.detach().index_select(0, rows))
            total += _kl_chunk(student, part, taught, temperature, rows, grads, any(wants))
            del taught
        return total.to(grads.sum_dtype), grads.take()

    return sum_loss(hidden, weight, bias, work)


def _kl_chunk(
    student: Head,
    hidden: Tensor,
    taught: Tensor,
    temperature: float,
    rows: Tensor,
    grads: Gradients,
    has_grad: bool,
) -> Tensor:
    """KL of one chunk, float64; adds its gradient (p_student - p_teacher) / temperature."""
    z = student.logits(hidden)
    kept = z.clone() if student.settings.softcap > 0 and has_grad else None
    log_q = z.div_(temperature).log_softmax(1)
    log_p = taught.div_(temperature).log_softmax(1)
    p = log_p.exp()
    total = (log_p.sub_(log_q).mul_(p)).sum(dtype=torch.float64)
    if has_grad:
        d = log_q.exp_().sub_(p).div_(temperature)
        grads.add(rows, hidden, student.uncap(d, kept))
    return total


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float = 0.0,
    scale: float = 1.0,
    bias: Tensor | None = None,
    distribution: Distribution | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-prob of each target [T], entropy of each row [T]), float32; 0 where IGNORE.

    `distribution`: what the targets were drawn from (None: the softmax of the logits); a target
    that it leaves out has -inf. Which tokens it leaves out is a constant for the gradient. Float64
    for float64 hidden states. Raises KernelError as `chunked_cross_entropy`.
    """
    check(hidden, weight, bias, targets)
    settings = HeadSettings(softcap, scale, chunk_rows, distribution or PLAIN)
    tensors = (hidden, weight, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        apply: Any = _RowValues.apply
        pair: tuple[Tensor, Tensor] = apply(hidden, weight, bias, targets, settings)
        return pair
    return _row_values(hidden.detach(), make_head(weight, bias, settings), targets)


def chunked_dpo_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    query_starts: Tensor,
    *,
    softcap: float = 0.0,
    scale: float = 1.0,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum of the targets' log-probs of each sequence [S], as DPO and its kin need them.

    query_starts [S + 1]: borders of the sequences in the packed rows.
    """
    if int(query_starts[-1]) != len(hidden):
        raise KernelError(
            f"query_starts end at {int(query_starts[-1])} but there are {len(hidden)} tokens"
        )
    logprobs, _ = chunked_logprobs(
        hidden, weight, targets, softcap=softcap, scale=scale, bias=bias, chunk_rows=chunk_rows
    )
    starts = query_starts.long()
    lens = starts[1:] - starts[:-1]
    owner = torch.repeat_interleave(torch.arange(len(lens), device=lens.device), lens)
    return logprobs.new_zeros(len(lens)).index_add(0, owner, logprobs)


class _RowValues(torch.autograd.Function):
    """(logprobs, entropies); backward computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, settings: HeadSettings
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.head = make_head(weight, bias, settings)
        return _row_values(hidden, ctx.head, targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor, d_entropy: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        head, settings = ctx.head, ctx.head.settings
        grads = Gradients(head, hidden, ctx.needs_input_grad[:3])
        is_plain = bias is None and settings.softcap == 0
        is_native = is_plain and can_differentiate(hidden, len(weight))
        add = _add_native if is_native else _add_chunk
        for rows in split_rows(valid_rows(targets, len(weight)), len(weight), settings):
            wanted = targets[rows].long()
            add(
                grads, rows, hidden.index_select(0, rows), wanted, d_logprobs[rows], d_entropy[rows]
            )
        found = as_inputs(grads.take(is_final=True), (hidden, weight, bias))
        return (*found, None, None)


def _add_chunk(
    grads: Gradients, rows: Tensor, hidden: Tensor, wanted: Tensor, g: Tensor, k: Tensor
) -> None:
    """A chunk's part of the gradients, by PyTorch."""
    head, settings = grads.head, grads.head.settings
    z = head.logits(hidden)
    kept = z.clone() if settings.softcap > 0 else None
    grads.add(rows, hidden, head.uncap(_row_gradient(z, wanted, settings, g, k), kept))


def _add_native(
    grads: Gradients, rows: Tensor, hidden: Tensor, wanted: Tensor, g: Tensor, k: Tensor
) -> None:
    """The same with logits of a few rows at a time, and their gradient in the compute dtype."""
    head, settings = grads.head, grads.head.settings
    d = hidden.new_empty(len(rows), len(head.weight))
    for part in _few(len(rows)):
        z = head.logits(hidden[part])
        upstream = (g[part] * settings.scale, k[part] * settings.scale)
        row_gradient(z, wanted[part], settings.distribution, *upstream, d[part])
    grads.add_scaled(rows, hidden, d)


def _few(num_rows: int) -> list[slice]:
    return [slice(i, i + FEW_ROWS) for i in range(0, num_rows, FEW_ROWS)]


def _row_gradient(
    z: Tensor, wanted: Tensor, settings: HeadSettings, d_logprob: Tensor, d_entropy: Tensor
) -> Tensor:
    """d z [r, V] of the formula above. The entropy's term is left out when nobody asks for it."""
    t = settings.distribution.temperature
    log_p = _kept_logits(z, settings.distribution).log_softmax(1)
    p = log_p.exp()
    d = p * -d_logprob[:, None].to(z.dtype)
    if bool(d_entropy.any()):
        log_p.masked_fill_(p == 0, 0.0)  # 0 log 0
        entropy = -(p * log_p).sum(1, keepdim=True)
        d -= log_p.add_(entropy).mul_(p).mul_(d_entropy[:, None].to(z.dtype))
    d.scatter_add_(1, wanted[:, None], d_logprob[:, None].to(z.dtype))
    return d if t == 1.0 else d.div_(t)


def _kept_logits(z: Tensor, distribution: Distribution) -> Tensor:
    """Logits [r, V] over the temperature, -inf where the distribution leaves a token out."""
    scaled = z if distribution.temperature == 1.0 else z / distribution.temperature
    if distribution == Distribution(distribution.temperature):
        return scaled
    rows = np.array(z.detach().float().cpu())  # overwritten by their probabilities
    chosen = np.zeros(len(rows), np.int32)
    probs = score(rows, chosen, [distribution], wants_probs=True).probs
    return scaled.masked_fill(torch.from_numpy(probs).to(z.device) == 0, -torch.inf)


@torch.no_grad()
def _row_values(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    settings, vocab = head.settings, len(head.weight)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logprobs = hidden.new_zeros(len(hidden), dtype=dtype)
    entropies = torch.zeros_like(logprobs)
    if hidden.device.type == "cpu":
        settings = replace(settings, chunk_rows=min(FEW_ROWS, settings.chunk_rows or FEW_ROWS))
    for rows in split_rows(valid_rows(targets, vocab), vocab, settings):
        z = head.logits(hidden.index_select(0, rows))
        found = _score(z, targets[rows].long(), settings.distribution)
        logprobs[rows], entropies[rows] = (values.to(dtype) for values in found)
        del z
    return logprobs, entropies


def _score(z: Tensor, wanted: Tensor, distribution: Distribution) -> tuple[Tensor, Tensor]:
    """(log-prob [r], entropy [r]) in float64.

    On the CPU by the sampler's own function, so that the log-prob has the engine's bits; elsewhere,
    and for float64, PyTorch's.
    """
    if z.dtype == torch.float32 and z.device.type == "cpu":
        found = score(z.numpy(), wanted.numpy().astype(np.int32), [distribution])
        return torch.from_numpy(found.logprobs), torch.from_numpy(found.entropies)
    log_p = _kept_logits(z, distribution).double().log_softmax(1)
    weighted = (log_p.exp() * log_p).nan_to_num_(0.0)
    return log_p.gather(1, wanted[:, None])[:, 0], -weighted.sum(1)
