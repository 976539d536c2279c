"""What the chunked head ops share: chunks of rows, their logits, and the gradients they sum up.

Legend: T tokens, r rows of a chunk, V vocabulary, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sterna.core.errors import KernelError
from sterna.data.pack import IGNORE
from sterna.kernels import ops
from sterna.kernels.scores import PLAIN, Distribution
from sterna.train.longseq.config import chunk_rows_of


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """How logits follow from hidden states: softcap(scale * h W^T + bias)."""

    softcap: float = 0.0
    scale: float = 1.0
    chunk_rows: int | None = None
    distribution: Distribution = PLAIN  # of the log-probs; other losses take all of it


@dataclass(slots=True)
class Head:
    """A head during one call: makes chunks of logits, takes gradients of them back."""

    weight: Tensor
    bias: Tensor | None
    settings: HeadSettings
    packed: Tensor

    def logits(self, hidden: Tensor) -> Tensor:
        """[r, D] -> [r, V] float32 (float64 for float64), memory of its own."""
        s, vocab = self.settings, self.weight.shape[0]
        if self.bias is None:
            return ops.logits(hidden, self.packed, vocab, s.softcap, s.scale)
        z = ops.logits(hidden, self.packed, vocab, 0.0, s.scale).add_(self.bias)
        return z.div_(s.softcap).tanh_().mul_(s.softcap) if s.softcap > 0 else z

    def uncap(self, d_logits: Tensor, logits: Tensor | None) -> Tensor:
        """Gradient before the softcap; in place. `logits` is read with a softcap only."""
        cap = self.settings.softcap
        if logits is None or cap <= 0:
            return d_logits
        return d_logits.mul_(logits.div_(cap).square_().neg_().add_(1.0))


def make_head(weight: Tensor, bias: Tensor | None, settings: HeadSettings) -> Head:
    """A head for one call: the weight is packed here, once for all chunks."""
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    return Head(weight, bias, settings, ops.pack_weight(weight))


class Gradients:
    """Sums the gradients of hidden states, weight and bias over the chunks of a call."""

    def __init__(self, head: Head, hidden: Tensor, wants: tuple[bool, ...]) -> None:
        self.head = head
        is_wide = hidden.dtype == torch.float64
        self.sum_dtype = torch.float64 if is_wide else torch.float32
        weight = head.weight
        self.hidden = torch.zeros_like(hidden) if wants[0] else None
        self._wants_weight = wants[1]
        self.weight: Tensor | None = None
        has_bias = wants[2] and head.bias is not None
        self.bias = weight.new_zeros(weight.shape[0], dtype=self.sum_dtype) if has_bias else None

    def add(self, rows: Tensor, hidden: Tensor, d_logits: Tensor) -> None:
        """`d_logits` [r, V] before softcap, of the rows `rows` whose hidden states are `hidden`.

        Products in the compute dtype (bf16 products are summed in float32 by the matmul).
        """
        if self.bias is not None:
            self.bias += d_logits.sum(0, dtype=self.sum_dtype)
        scale = self.head.settings.scale
        self.add_scaled(
            rows, hidden, (d_logits.mul_(scale) if scale != 1.0 else d_logits).to(hidden.dtype)
        )

    def add_scaled(self, rows: Tensor, hidden: Tensor, d: Tensor) -> None:
        """`add` of gradients that are multiplied by the scale and in the compute dtype already.

        The weight's is summed in float32 from the second chunk on; one chunk is its own sum.
        """
        if self.hidden is not None:
            self.hidden.index_copy_(0, rows, d @ self.head.weight)
        if self._wants_weight:
            part = d.t() @ hidden
            self.weight = part if self.weight is None else self.weight.to(self.sum_dtype).add_(part)

    def take(self, is_final: bool = False) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The sums, for hidden, weight and bias. `is_final`: nobody scales them, so that a single
        chunk's weight gradient may stay in the compute dtype, which it was rounded to.
        """
        if self._wants_weight and self.weight is None:
            self.weight = torch.zeros_like(self.head.weight)
        if self.weight is not None and not is_final:
            self.weight = self.weight.to(self.sum_dtype)
        return self.hidden, self.weight, self.bias


def split_rows(rows: Tensor, vocab_size: int, settings: HeadSettings) -> Iterator[Tensor]:
    """The row indices `rows` in pieces of one chunk."""
    if rows.numel():
        yield from torch.split(rows, chunk_rows_of(vocab_size, settings.chunk_rows))


def as_inputs(grads: tuple[Tensor | None, ...], like: tuple[Any, ...]) -> tuple[Any, ...]:
    """Each gradient in the dtype of the input it belongs to."""
    pairs = zip(grads, like, strict=True)
    return tuple(None if g is None else g.to(x.dtype) for g, x in pairs)


def valid_rows(targets: Tensor, vocab_size: int) -> Tensor:
    """Indices of the rows that have a target. Raises KernelError for one beyond the vocabulary."""
    if targets.numel() and int(targets.max()) >= vocab_size:
        raise KernelError(f"target {int(targets.max())} in a vocabulary of {vocab_size} tokens")
    return (targets != IGNORE).nonzero()[:, 0]


def check(hidden: Tensor, weight: Tensor, bias: Tensor | None, marks: Tensor | None) -> None:
    """Raises KernelError unless a head can be computed on these; `marks` has an entry a row."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise KernelError(
            f"the head's weight is {weight.dtype} {tuple(weight.shape)}; the chunked head takes a "
            "plain [V, D] one: train on unpacked weights, or dequantise the head"
        )
    fits = hidden.dim() == 2 and hidden.shape[1] == weight.shape[1]
    if not fits or hidden.dtype != weight.dtype:
        raise KernelError(
            f"hidden states {tuple(hidden.shape)} {hidden.dtype} do not fit the head's weight "
            f"{tuple(weight.shape)} {weight.dtype}; they must be [T, D] and [V, D] of one dtype"
        )
    if marks is not None and marks.shape != hidden.shape[:1]:
        raise KernelError(f"{tuple(marks.shape)} targets or marks for {len(hidden)} hidden states")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise KernelError(f"bias {tuple(bias.shape)} does not fit a vocabulary of {len(weight)}")
