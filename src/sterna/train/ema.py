"""The exponential moving average of the weights, in float32: avg = d avg + (1 - d) w.

Evals and the exported model use it; the run itself goes on from the live weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sterna.parallel.fsdp import local
from sterna.train.optim import AdamW


class Ema:
    """The average of trained weights; reads an optimizer's float32 masters where it has them."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self._decay = decay
        self._weights = {name: p for name, p in named if p.requires_grad}
        self.averages = {
            name: local(p.detach()).float().clone() for name, p in self._weights.items()
        }

    @torch.no_grad()
    def update(self, optimizer: AdamW) -> None:
        """Move towards the weights as they are now."""
        states = optimizer.state_dict()
        for name, average in self.averages.items():
            master = states[name].get("master")
            weight = local(self._weights[name].detach()).float() if master is None else master
            here = weight.view_as(average).to(average.device)  # an offloaded master is elsewhere
            average.lerp_(here, 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the averaged weights."""
        kept = {name: local(p.detach()).clone() for name, p in self._weights.items()}
        self._fill(self.averages)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            local(self._weights[name].detach()).copy_(value)
