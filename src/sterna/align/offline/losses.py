"""Pairs and labels as losses of the Trainer (`train.rowloss`); the formulae are in align/pairs.py.

Figures have TRL's names. Rewards are implicit, beta (log pi - log ref) of the whole answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sterna.align.offline.batches import answer_logprobs, batch_of, documents, nothing, sums
from sterna.align.offline.config import PreferenceSection
from sterna.align.offline.reference import Reference
from sterna.align.pairs import kto_loss, preference_loss
from sterna.data.pack import IGNORE, Document, PackedRow, sequences_of
from sterna.model.batch import Batch
from sterna.parallel.collectives import total
from sterna.parallel.mesh import Mesh
from sterna.train.rowloss import RowLoss


class PreferenceLoss(RowLoss):
    """DPO, cDPO and IPO on pairs."""

    names = (
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
        "logps/chosen", "logps/rejected",
    )  # fmt: skip

    def __init__(
        self, settings: PreferenceSection, reference: Reference, chunk_rows: int | None = None
    ) -> None:
        self._settings = settings
        self._reference = reference
        self._chunk_rows = chunk_rows

    def count(self, row: PackedRow) -> int:
        """Pairs."""
        return len(documents([row]))

    def __call__(self, model: Any, rows: Sequence[PackedRow]) -> tuple[Tensor, Tensor]:
        """See RowLoss."""
        pairs = documents(rows)
        if not pairs:
            return nothing(model), _no_sums(self.names, model.device)
        batch, targets = batch_of(pairs, model.device)
        logps = answer_logprobs(model, batch, targets, self._chunk_rows)
        ref = self._reference(pairs, batch, targets)
        chosen, rejected = logps[0::2], logps[1::2]
        gains = self._settings.beta * (logps - ref).detach()
        won, lost = gains[0::2], gains[1::2]
        figures = sums(won, lost, (won > lost).double(), won - lost, chosen, rejected)
        return self._losses(logps, ref, batch, targets).sum(), figures

    def _losses(self, logps: Tensor, ref: Tensor, batch: Batch, targets: Tensor) -> Tensor:
        chosen = self._settings
        if chosen.loss == "ipo":  # the mean over tokens
            sizes = _sizes(batch, targets)
            logps, ref = logps / sizes, ref / sizes
        halves = (logps[0::2], logps[1::2], ref[0::2], ref[1::2])
        return preference_loss(*halves, chosen.beta, chosen.loss, chosen.label_smoothing)[0]


class KtoLoss(RowLoss):
    """KTO on labelled answers; the KL of a step is known before its first micro-batch."""

    names = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl")

    def __init__(
        self, settings: PreferenceSection, reference: Reference, chunk_rows: int | None = None
    ) -> None:
        self._settings = settings
        self._reference = reference
        self._chunk_rows = chunk_rows
        self._kl = torch.zeros(())

    def count(self, row: PackedRow) -> int:
        """Labelled answers."""
        return len(documents([row]))

    @torch.no_grad()
    def prepare(self, model: Any, rows: Sequence[PackedRow], mesh: Mesh) -> None:
        """max(0, mean log-ratio) of the mismatched answers of all ranks."""
        found = torch.zeros(2, dtype=torch.float64, device=model.device)
        for row in rows:
            others = [one for document in documents([row]) for one in sequences_of(document)[1:]]
            if others:
                logps, ref = self._both(model, others)
                found += torch.stack([(logps - ref).double().sum(), found.new_tensor(len(others))])
        gain, count = total(found, mesh.data).tolist()
        self._kl = torch.tensor(max(0.0, gain / count) if count else 0.0, device=model.device)

    def __call__(self, model: Any, rows: Sequence[PackedRow]) -> tuple[Tensor, Tensor]:
        """See RowLoss."""
        answers = [sequences_of(document)[0] for document in documents(rows)]
        if not answers:
            return nothing(model), _no_sums(self.names, model.device)
        logps, ref = self._both(model, answers)
        label = torch.tensor([one.note > 0.5 for one in answers], device=model.device)
        chosen = self._settings
        weights = (chosen.desirable_weight, chosen.undesirable_weight)
        losses = kto_loss(logps, ref, label, self._kl, chosen.beta, *weights)
        gains = chosen.beta * (logps - ref).detach()
        kl = self._kl.expand(len(answers))
        columns = (gains[label], gains[~label], logps[label], logps[~label], kl)
        return losses.sum(), sums(*columns)

    def _both(self, model: Any, found: Sequence[Document]) -> tuple[Tensor, Tensor]:
        batch, targets = batch_of(found, model.device)
        logps = answer_logprobs(model, batch, targets, self._chunk_rows)
        return logps, self._reference(found, batch, targets)

    def figures(self, means: Mapping[str, float]) -> dict[str, float]:
        """With the margin, where the step had answers of both labels."""
        won, lost = means.get("rewards/chosen"), means.get("rewards/rejected")
        both = {} if won is None or lost is None else {"rewards/margins": won - lost}
        return {**means, **both}


def _no_sums(names: Sequence[str], device: torch.device) -> Tensor:
    return torch.zeros(len(names), 2, dtype=torch.float64, device=device)


def _sizes(batch: Batch, targets: Tensor) -> Tensor:
    """Trained tokens of each sequence [S]."""
    ends = torch.cat([targets.new_zeros(1), (targets != IGNORE).long().cumsum(0)])
    return ends[batch.query_starts.long()].diff()
