"""Completions side by side, without padding: the layout of every loss and advantage.

    N = all completion tokens of a batch        B = its completions
    starts [B + 1] int64    starts[b] .. starts[b + 1] are the tokens of completion b
    mask [N] bool           tokens the policy wrote and is trained on (false: tool output)

Weights make a loss a plain sum, so that it does not depend on how a batch is cut into
micro-batches: w_t is computed once over the whole batch, and every micro-batch adds sum w_t l_t.

    token      1 / M                     M = trained tokens of the batch (DAPO, 2503.14476)
    sequence   1 / (B m_b)               m_b = trained tokens of its completion (GRPO, 2402.03300)
    fixed      1 / (B length)            length = longest completion allowed (Dr.GRPO, 2503.20783)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sterna.core.errors import ConfigError

Aggregate = Literal["token", "sequence", "fixed"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the completions of a batch lie; see the module."""

    starts: Tensor  # [B + 1] int64
    mask: Tensor  # [N] bool

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.starts) - 1

    @property
    def owner(self) -> Tensor:
        """[N] int64: the completion of each token."""
        lengths = self.starts.diff()
        index = torch.arange(self.num_sequences, device=lengths.device)
        return torch.repeat_interleave(index, lengths)

    def counts(self) -> Tensor:
        """[B] int64: trained tokens of each completion."""
        return self.sums(self.mask.long())

    def sums(self, values: Tensor) -> Tensor:
        """values [N] -> [B], summed over the trained tokens of each completion."""
        kept = torch.where(self.mask, values, torch.zeros_like(values))
        return kept.new_zeros(self.num_sequences).index_add(0, self.owner, kept)

    def means(self, values: Tensor) -> Tensor:
        """values [N] -> [B], averaged over trained tokens; 0 where there are none."""
        return self.sums(values) / self.counts().clamp(min=1)

    def spread(self, values: Tensor) -> Tensor:
        """values [B] -> [N], one for each token of a completion."""
        return values.index_select(0, self.owner)

    def last_tokens(self) -> Tensor:
        """[B] int64: index of the last trained token of each completion, -1 where there is none."""
        index = torch.arange(len(self.mask), device=self.mask.device)
        marked = torch.where(self.mask, index, torch.full_like(index, -1))
        found = torch.full_like(self.starts[1:], -1)
        return found.scatter_reduce(0, self.owner, marked, "amax", include_self=True)


def layout_of(lengths: Sequence[int], mask: Tensor | None = None) -> Layout:
    """The layout of completions of these lengths; all tokens trained without a mask [N]."""
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    starts[1:] = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    if mask is None:
        mask = torch.ones(int(starts[-1]), dtype=torch.bool)
    return Layout(starts, mask)


def token_weights(layout: Layout, aggregate: Aggregate, max_length: int = 0) -> Tensor:
    """w [N] float32 of a whole batch, 0 on tokens that are not trained. See the module.

    ConfigError for `fixed` without a positive `max_length`.
    """
    mask = layout.mask.float()
    if aggregate == "token":
        return mask / mask.sum().clamp(min=1)
    if aggregate == "sequence":
        counts = layout.counts().clamp(min=1) * layout.num_sequences
        return mask / layout.spread(counts)
    if max_length < 1:
        raise ConfigError(
            f"aggregate = fixed divides by the longest completion allowed, given {max_length}; "
            "set it to 1 or more"
        )
    return mask / (layout.num_sequences * max_length)
