"""Small steps of a speculator on rows (hidden state, the tokens that followed), and their measure.

What `train/distill/speculator.py` does to whole documents is done here to single rows, so that an
engine, which may not reach the trainer, can refresh its speculator on what it serves. The base is
a table of head rows and a function that embeds; neither is changed.

Legend: B rows, n drafts, D the target's hidden size. tokens [B, n + 1]: the token drawn from the
hidden state, then those that followed.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sterna.model.speculator import Speculator

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Base:
    """What a speculator borrows of its target, in float32."""

    head: Tensor | None  # [num_outputs, D]; None when the speculator has its own
    embed: Callable[[Tensor], Tensor]  # token ids [B] -> [B, D]
    softcap: float = 0.0


def _state(
    s: Speculator, base: Base, draft: int, state: Tensor, cell: Tensor | None, tokens: Tensor
) -> tuple[Tensor, Tensor | None]:
    if not s.config.shares_base:
        return s.step(draft, state, cell, tokens, state)
    rows = torch.arange(len(tokens))
    return s.step(draft, state, cell, rows, base.embed(tokens))


def _logits(s: Speculator, base: Base, state: Tensor) -> Tensor:
    if s.head is not None:
        return F.linear(state, s.head.weight)
    assert base.head is not None
    logits = F.linear(s.before_head(state), base.head)
    return logits if base.softcap == 0 else base.softcap * torch.tanh(logits / base.softcap)


def draft_loss(s: Speculator, base: Base, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy of all drafts, each given the text's own tokens. hidden [B, D]."""
    state, cell = s.start(hidden)
    total = hidden.new_zeros(())
    count = 0
    for draft in range(s.config.num_drafts):
        state, cell = _state(s, base, draft, state, cell, tokens[:, draft])
        wanted = s.outputs_of(tokens[:, draft + 1].contiguous(), IGNORE).long()
        count += int((wanted != IGNORE).sum())
        logits = _logits(s, base, state)
        total = total + F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum")
    return total / max(1, count)


@torch.no_grad()
def num_accepted(s: Speculator, base: Base, hidden: Tensor, tokens: Tensor) -> Tensor:
    """How many drafts of each row [B] come true when each draft reads the one before, as served."""
    state, cell = s.start(hidden)
    given, is_right = tokens[:, 0], torch.ones(len(tokens), dtype=torch.bool)
    found = torch.zeros(len(tokens))
    for draft in range(s.config.num_drafts):
        state, cell = _state(s, base, draft, state, cell, given)
        given = s.tokens_of(_logits(s, base, state).argmax(-1).to(tokens.dtype))
        is_right &= given == tokens[:, draft + 1]
        found += is_right
    return found


class Update:
    """A float32 copy of a speculator under AdamW."""

    def __init__(self, served: Speculator, base: Base, lr: float) -> None:
        self.speculator = deepcopy(served).float()
        self.speculator.requires_grad_(True)
        self._base = base
        self._optim = torch.optim.AdamW(self.speculator.parameters(), lr=lr, weight_decay=0.0)

    def step(self, hidden: Tensor, tokens: Tensor) -> float:
        """One step on a batch of rows; its loss."""
        self._optim.zero_grad(set_to_none=True)
        loss = draft_loss(self.speculator, self._base, hidden, tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.speculator.parameters(), 1.0)
        self._optim.step()
        return loss.item()
