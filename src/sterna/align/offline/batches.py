"""Documents of several sequences as batches, and the log-prob of each sequence's answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sterna.data.pack import Document, PackedRow, documents_of, filler, join
from sterna.model.batch import Batch
from sterna.train.longseq.head import chunked_dpo_logps
from sterna.train.step import as_batch


def documents(rows: Sequence[PackedRow]) -> list[Document]:
    """All documents of rows, without fillers."""
    return [document for row in rows for document in documents_of(row)]


def batch_of(sequences: Sequence[Document], device: torch.device) -> tuple[Batch, Tensor]:
    """Documents side by side: their sequences are the batch's, in order; targets [T] int64."""
    return as_batch([join(sequences)], device)


def nothing(model: Any) -> Tensor:
    """A zero that every weight of a forward has a (zero) gradient of: a rank without rows."""
    batch, _ = as_batch([filler()], model.device)
    found: Tensor = model.values(batch) if hasattr(model, "values") else model.hidden(batch)
    return found.float().sum() * 0.0


def answer_logprobs(
    model: Any, batch: Batch, targets: Tensor, chunk_rows: int | None = None
) -> Tensor:
    """Sum of the log-probs of each sequence's trained tokens: float32 [S]."""
    return chunked_dpo_logps(
        model.hidden(batch),
        model.head_weight(),
        targets,
        batch.query_starts,
        softcap=float(getattr(model.config, "logits_softcap", 0.0)),
        bias=model.head_bias(),
        chunk_rows=chunk_rows,
    )


def key_of(sequence: Document) -> bytes:
    """16 bytes that tell sequences apart: tokens, and which of them are trained."""
    digest = hashlib.blake2b(sequence.tokens.tobytes(), digest_size=16)
    digest.update(sequence.targets.tobytes())
    return digest.digest()


def sums(*columns: Tensor) -> Tensor:
    """[F, 2] float64 of F columns of values: sum and number of each."""
    found = [c.detach().double().sum() for c in columns]
    counts = torch.tensor([float(c.numel()) for c in columns], dtype=torch.float64)
    return torch.stack([torch.stack(found), counts.to(columns[0].device)], 1)
