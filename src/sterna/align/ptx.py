"""The language-model loss that is mixed into the policy's updates, so that it forgets less.

    gradient += coef * gradient of the mean cross entropy of `rows` packed rows

The rows are read in the loader's order, whose place is part of a checkpoint; at their end they
begin anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from sterna.align.config import PtxSection
from sterna.core.errors import DataError
from sterna.data.loader import Loader
from sterna.data.pack import IGNORE, PackedRow
from sterna.model.decoder import Decoder
from sterna.text.tokenizer import Tokenizer
from sterna.train.step import as_batch, cross_entropy

if TYPE_CHECKING:
    from sterna.align.learner import Trained


class Ptx:
    """Adds its gradients to those of an update."""

    def __init__(self, settings: PtxSection, loader: Loader, device: torch.device) -> None:
        self.num_micros = settings.rows
        self._coef = settings.coef
        self._loader = loader
        self._rows = iter(loader)
        self._device = device

    def add(self, policy: Trained) -> float:
        """Differentiate the next rows; returns their mean loss, without the coefficient."""
        rows = [self._next() for _ in range(self.num_micros)]
        count = max(1, sum(int((row.targets != IGNORE).sum()) for row in rows))
        total = 0.0
        for row in rows:
            loss = cross_entropy(policy.model, *as_batch([row], self._device)) / count
            torch.autograd.backward(self._coef * loss)
            policy.gradients.add()
            total += float(loss.detach())
        return total

    def _next(self) -> PackedRow:
        row = next(self._rows, None)
        if row is None:
            self._loader.rewind()
            self._rows = iter(self._loader)
            row = next(self._rows, None)
        if row is None:
            raise DataError("ptx.data has no row; see its sources")
        return row

    def state_dict(self) -> dict[str, Any]:
        """The place of the next row."""
        return self._loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there. Errors as Loader.load_state_dict."""
        self._loader.load_state_dict(state)
        self._rows = iter(self._loader)

    def close(self) -> None:
        """End the loader's threads."""
        self._loader.close()


def make_ptx(
    settings: PtxSection, policy: Decoder, tokenizer: Tokenizer, device: torch.device
) -> Ptx | None:
    """None without a coefficient. DataError for sources that cannot be read."""
    if not settings.coef or settings.data is None:
        return None
    loader = Loader(settings.data, tokenizer, max_document=policy.config.num_positions)
    return Ptx(settings, loader, device)
