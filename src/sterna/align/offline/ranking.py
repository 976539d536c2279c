"""A reward model's loss on pairs, and how its probabilities fit what it gets right.

A score is the value at the last token of a sequence, which is the EOS where the row ends with one:
there is no padding that could stand for it. With d = score of the chosen less that of the rejected,
the model says "chosen" with probability sigma(d). Calibration bins max(sigma(d), sigma(-d)) of all
pairs and compares it with how often the larger score is the chosen's:

    ECE = sum over bins of (pairs in the bin / all pairs) |mean probability - share that is right|
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from sterna.align.offline.batches import batch_of, documents, nothing, sums
from sterna.align.pairs import reward_pair_loss, reward_token_loss
from sterna.data.pack import PackedRow
from sterna.model.batch import Batch
from sterna.train.rowloss import RowLoss

BINS = 10  # of probabilities 0.5 to 1
_PLAIN = ("accuracy", "margin", "mean_reward", "rewards/chosen", "rewards/rejected")
_KINDS = ("share", "sure", "right")  # of each bin, over all pairs


class RewardLoss(RowLoss):
    """Bradley-Terry on pairs; "tokens" is DeepSpeed-Chat's, from where the two part."""

    names = (*_PLAIN, *(f"{kind}_{i}" for kind in _KINDS for i in range(BINS)))

    def __init__(self, kind: Literal["last", "tokens"] = "last") -> None:
        self._kind = kind
        # (probability, share right, share of pairs) of the bins that were met last
        self.calibration: list[tuple[float, float, float]] = []

    def count(self, row: PackedRow) -> int:
        """Pairs."""
        return len(documents([row]))

    def __call__(self, model: Any, rows: Sequence[PackedRow]) -> tuple[Tensor, Tensor]:
        """See RowLoss."""
        pairs = documents(rows)
        if not pairs:
            empty = torch.zeros(len(self.names), 2, dtype=torch.float64, device=model.device)
            return nothing(model), empty
        batch, _ = batch_of(pairs, model.device)
        margin = torch.tensor([pair.note for pair in pairs], device=model.device)
        if self._kind == "last":
            scores = model.values(at_last_tokens(batch))
            losses = reward_pair_loss(scores[0::2], scores[1::2], margin)
        else:
            values = model.values(batch)
            scores = values[batch.query_starts[1:].long() - 1]
            losses = _token_losses(values, batch)
        return losses.sum(), _figures(scores.detach().double())

    def figures(self, means: Mapping[str, float]) -> dict[str, float]:
        """With `ece`, and without the bins, which are kept in `calibration`."""
        if "accuracy" not in means:
            return {}
        bins = [[means[f"{kind}_{i}"] for kind in _KINDS] for i in range(BINS)]
        self.calibration = [(sure / n, right / n, n) for n, sure, right in bins if n]
        ece = sum(abs(sure - right) for _, sure, right in bins)
        return {**{name: means[name] for name in _PLAIN}, "ece": ece}


def at_last_tokens(batch: Batch) -> Batch:
    """The same batch, of which only the hidden states of last tokens are wanted."""
    return replace(batch, output_rows=batch.query_starts[1:] - 1)


def _token_losses(values: Tensor, batch: Batch) -> Tensor:
    """The loss of each pair [P], the mean over its tokens from the first that differs."""
    starts = batch.query_starts.tolist()
    losses = []
    for a, b, c in zip(starts[0::2], starts[1::2], starts[2::2], strict=False):
        first = _first_difference(batch.tokens[a:b], batch.tokens[b:c])
        losses.append(reward_token_loss(values[a:b], values[b:c], first))
    return torch.stack(losses)


def _first_difference(one: Tensor, other: Tensor) -> int:
    """Where two sequences part; where the shorter one ends, if it is the other's beginning."""
    size = min(len(one), len(other))
    differs = (one[:size] != other[:size]).nonzero()
    return int(differs[0]) if len(differs) else size


def _figures(scores: Tensor) -> Tensor:
    """[F, 2] of RewardLoss.names, of scores [2 P]."""
    chosen, rejected = scores[0::2], scores[1::2]
    gap = chosen - rejected
    is_right = (gap > 0).double()
    sure = torch.sigmoid(gap.abs())
    place = ((sure - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    bins = [(place == i).double() for i in range(BINS)]
    return sums(
        is_right, gap, scores, chosen, rejected,
        *bins, *(one * sure for one in bins), *(one * is_right for one in bins),
    )  # fmt: skip
