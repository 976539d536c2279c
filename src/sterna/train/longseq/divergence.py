"""How far a student is from its teacher, a chunk of rows at a time: the divergence of GKD.

With p the teacher's and q the student's distribution at temperature T, m = beta p + (1 - beta) q:

    D = beta KL(p || m) + (1 - beta) KL(q || m)         (arXiv 2306.13649, eq. 1)
    beta = 0   KL(p || q)        the limits of D / beta and D / (1 - beta): forward KL,
    beta = 1   KL(q || p)        and reverse KL

With respect to the student's logits z, for a row of weight w:

    d z_j = w / T q_j (g_j - sum_i q_i g_i),   g = (1 - beta) log(q / m)
    beta = 0   d z_j = w / T (q_j - p_j)
    beta = 1   g = log(q / p)

Legend: T tokens, r rows of a chunk, V vocabulary, D hidden_size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sterna.core.errors import KernelError
from sterna.train.longseq.chunks import Gradients, HeadSettings, check, make_head, split_rows
from sterna.train.longseq.head import sum_loss


@dataclass(frozen=True, slots=True)
class Logits:
    """What a model's logits are made of: softcap(hidden weight^T + bias)."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None = None
    softcap: float = 0.0


@dataclass(slots=True)
class Divergence:
    """Weighted sums over the rows. `loss` has a graph, the others are for the log."""

    loss: Tensor
    reverse_kl: float = 0.0  # of KL(q || p)
    entropy: float = 0.0  # of q


def chunked_jsd(
    student: Logits,
    teacher: Logits,
    row_weights: Tensor,
    beta: float,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> Divergence:
    """SUM over rows of row_weights [T] times D; rows of weight 0 are not computed.

    The teacher's hidden size may differ, its vocabulary must not; it gets no gradient. Raises
    KernelError for shapes that do not fit or a packed or quantised weight.
    """
    check(student.hidden, student.weight, student.bias, row_weights)
    check(teacher.hidden, teacher.weight, teacher.bias, row_weights)
    if student.weight.shape[0] != teacher.weight.shape[0]:
        raise KernelError(
            f"the student has {student.weight.shape[0]} logits and the teacher "
            f"{teacher.weight.shape[0]}; a divergence needs one vocabulary"
        )
    found = Divergence(student.hidden.new_zeros(()))
    settings = HeadSettings(student.softcap, 1.0, chunk_rows)
    hidden = student.hidden.detach()

    @torch.no_grad()
    def work(wants: tuple[bool, ...]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        head = make_head(student.weight, student.bias, settings)
        taught = make_head(teacher.weight, teacher.bias, HeadSettings(teacher.softcap))
        grads = Gradients(head, hidden, wants)
        total = hidden.new_zeros((), dtype=torch.float64)
        for rows in split_rows(row_weights.nonzero()[:, 0], len(student.weight), settings):
            part, weights = hidden.index_select(0, rows), row_weights[rows][:, None].double()
            z = head.logits(part)
            kept = z.clone() if student.softcap > 0 and any(wants) else None
            log_q = z.div_(temperature).log_softmax(1)
            other = taught.logits(teacher.hidden.detach().index_select(0, rows))
            log_p = other.div_(temperature).log_softmax(1)
            total += _add(found, log_q, log_p, weights, beta)
            if any(wants):
                d = _gradient(log_q, log_p, beta).mul_((weights / temperature).to(log_q.dtype))
                grads.add(rows, part, head.uncap(d, kept))
            del z, other
        return total.to(grads.sum_dtype), grads.take()

    found.loss = sum_loss(student.hidden, student.weight, student.bias, work)
    return found


def _mixture(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))


def _add(found: Divergence, log_q: Tensor, log_p: Tensor, weights: Tensor, beta: float) -> Tensor:
    """The chunk's loss, float64; what is logged is added to `found`."""
    q = log_q.exp()
    reverse = _weighted(q * (log_q - log_p), weights)
    found.reverse_kl += float(reverse)
    found.entropy -= float(_weighted(q * log_q, weights))
    if beta == 1.0:
        return reverse
    if beta == 0.0:
        return _weighted(log_p.exp() * (log_p - log_q), weights)
    log_m = _mixture(log_q, log_p, beta)
    of_teacher = _weighted(log_p.exp() * (log_p - log_m), weights)
    return beta * of_teacher + (1.0 - beta) * _weighted(q * (log_q - log_m), weights)


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    return (values.sum(1, dtype=torch.float64) * weights[:, 0]).sum()


def _gradient(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """d z [r, V] of a row of weight 1 at temperature 1; see the module."""
    q = log_q.exp()
    if beta == 0.0:
        return q - log_p.exp()
    if beta == 1.0:
        g = log_q - log_p
    else:
        g = (log_q - _mixture(log_q, log_p, beta)).mul_(1.0 - beta)
    return q.mul_(g.sub_((q * g).sum(1, keepdim=True)))
