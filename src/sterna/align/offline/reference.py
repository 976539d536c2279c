"""What a policy is compared with: the log-probs of the same answers under a frozen model.

    FrozenCopy    a second model in memory
    AdapterOff    the policy itself without its adapter: no second model
    Kept          numbers computed once, before the first step, and kept under STERNA_HOME by the
                  content of model, data and settings: no second model, no second forward

On a CPU a sequence's log-prob does not depend on what lies beside it in a row, so all three give
the policy's own bits while its weights are the reference's: the first step's log-ratios are 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sterna.align.offline.batches import answer_logprobs, batch_of, documents, key_of
from sterna.core.errors import TrainError
from sterna.core.kept import kept
from sterna.data.pack import Document, PackedRow, sequences_of
from sterna.model.batch import Batch
from sterna.model.decoder import Decoder
from sterna.train.adapter import adapter_off

_RECORD = np.dtype([("key", "V16"), ("value", "<f4")])
_VERSION = 1


class Reference(Protocol):
    """Log-probs [S] float32 of a batch's sequences, without a graph."""

    def __call__(self, found: Sequence[Document], batch: Batch, targets: Tensor) -> Tensor:
        """`found`: the documents that the batch was made of."""
        ...


class FrozenCopy:
    """A model of its own."""

    def __init__(self, model: Any, chunk_rows: int | None) -> None:
        self._model = model.requires_grad_(False).eval()
        self._chunk_rows = chunk_rows

    @torch.no_grad()
    def __call__(self, found: Sequence[Document], batch: Batch, targets: Tensor) -> Tensor:
        return answer_logprobs(self._model, batch, targets, self._chunk_rows)


class AdapterOff:
    """The policy's base."""

    def __init__(self, policy: Decoder, chunk_rows: int | None) -> None:
        self._policy = policy
        self._chunk_rows = chunk_rows

    @torch.no_grad()
    def __call__(self, found: Sequence[Document], batch: Batch, targets: Tensor) -> Tensor:
        with adapter_off(self._policy):
            return answer_logprobs(self._policy, batch, targets, self._chunk_rows)


class Kept:
    """Numbers by the content of sequences."""

    def __init__(self, values: Mapping[bytes, float]) -> None:
        self._values = values

    def __call__(self, found: Sequence[Document], batch: Batch, targets: Tensor) -> Tensor:
        keys = [key_of(part) for document in found for part in sequences_of(document)]
        missing = sum(key not in self._values for key in keys)
        if missing:
            raise TrainError(
                f"{missing} of {len(keys)} answers have no kept reference; the data are not those "
                "that were read before the first step. Start the run again"
            )
        return torch.tensor([self._values[key] for key in keys], device=targets.device)


def precomputed(
    load: Callable[[], Any], facts: str, rows: Iterable[PackedRow], chunk_rows: int | None
) -> Kept:
    """The log-probs of all sequences of `rows` under the model that `load` gives.

    `facts`: what they depend on beside the rows' content, as text. Read back where they are kept.
    """

    def make() -> bytes:
        return _computed(load(), rows, chunk_rows)

    found = np.frombuffer(kept("reference", f"{_VERSION} {facts}", make), _RECORD)
    return Kept({bytes(key): float(value) for key, value in found.tolist()})


@torch.no_grad()
def _computed(model: Any, rows: Iterable[PackedRow], chunk_rows: int | None) -> bytes:
    found: dict[bytes, float] = {}
    for row in rows:
        parts = [part for document in documents([row]) for part in sequences_of(document)]
        new = {key: part for part in parts if (key := key_of(part)) not in found}
        if new:
            batch, targets = batch_of(list(new.values()), model.device)
            values = answer_logprobs(model, batch, targets, chunk_rows).tolist()
            found.update(zip(new, values, strict=True))
    return np.array(list(found.items()), _RECORD).tobytes()


def weights_hash(model: nn.Module) -> str:
    """A hash of all weights (about 1 GB/s)."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
