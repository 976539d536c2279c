"""Training of a speculator beside its frozen target.

Every position t of a document trains all n drafts at once, with the text's own tokens as inputs:
cross entropy of draft i against x_(t+2+i) where that is a trained token of the same document. The
drafts' states are stacked, so one chunked head call serves all of them and its weight gradient.
The loss is a mean over trained tokens of the mean over drafts.

`acceptance` walks over held-out text as an engine would: the target gives one token, the drafts
that follow are kept up to the first wrong one, the target's next token comes after them. On text
that the target wrote greedily this is exactly what greedy verification accepts.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sterna.data.pack import IGNORE
from sterna.kernels import ops
from sterna.model.batch import Batch
from sterna.model.config import ModelConfig
from sterna.model.decoder import Decoder
from sterna.model.speculator import Speculator, SpeculatorConfig
from sterna.train.longseq.head import chunked_cross_entropy

_ARGMAX_ROWS = 1024  # float32 logits of 49,152 tokens: 200 MB


class SpeculatorPair(nn.Module):
    """A frozen target and the speculator that is trained; as a model it is the target."""

    config: ModelConfig

    def __init__(self, base: Decoder, config: SpeculatorConfig, seed: int = 0) -> None:
        super().__init__()
        config.check_base(base)
        base.requires_grad_(False)
        self.config = base.config
        self.base = base
        self.speculator = Speculator(config)
        self.speculator.init_weights(seed)
        self.speculator.to(device=base.device, dtype=base.dtype)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.base.device

    def hidden(self, batch: Batch) -> Tensor:
        """The target's final normed hidden states [T, D], without a graph."""
        with torch.no_grad():
            return self.base.hidden(batch)

    def head_weight(self) -> Tensor:
        """The target's."""
        return self.base.head_weight()

    def head_bias(self) -> Tensor | None:
        """The target's."""
        return self.base.head_bias()

    def drafted(self, batch: Batch) -> Tensor:
        """What the drafts' head multiplies, [n, T, .], every draft given the text's tokens."""
        count = self.speculator.config.num_drafts
        inputs = [ahead(batch.tokens, batch, i + 1, 0) for i in range(count)]
        table = self.base.embed_tokens.weight
        states = self.speculator.states(self.hidden(batch), inputs, table)
        return torch.stack([self.speculator.before_head(state) for state in states])


def ahead(values: Tensor, batch: Batch, distance: int, missing: int) -> Tensor:
    """values[t + distance] for every t [T], `missing` where the document ends before."""
    lengths = batch.query_starts[1:] - batch.query_starts[:-1]
    ends = torch.repeat_interleave(batch.query_starts[1:], lengths).long()
    at = torch.arange(len(values), device=values.device) + distance
    found = values[at.clamp(max=len(values) - 1)]
    return torch.where(at < ends, found, torch.full_like(found, missing))


def speculator_loss(
    model: SpeculatorPair, batch: Batch, targets: Tensor, *, chunk_rows: int | None = None
) -> Tensor:
    """The SUM over trained tokens of the drafts' mean cross entropy, float32 scalar."""
    drafted = model.drafted(batch)
    count = len(drafted)
    wanted = torch.cat([ahead(targets, batch, i + 1, IGNORE) for i in range(count)])
    wanted = model.speculator.outputs_of(wanted, IGNORE)
    head = model.speculator.head_weight(model.head_weight())
    total = chunked_cross_entropy(
        drafted.flatten(0, 1), head, wanted, softcap=_softcap(model), chunk_rows=chunk_rows
    )
    return total / count


def _softcap(model: SpeculatorPair) -> float:
    return model.config.logits_softcap if model.speculator.config.shares_base else 0.0


@dataclass(slots=True)
class Acceptance:
    """Counts of a simulated run: verification steps, and drafts right at each place."""

    steps: int
    tokens: int
    tried: list[int]
    right: list[int]  # of each draft, given the text (whether or not the ones before were right)

    @property
    def tokens_per_step(self) -> float:
        """Tokens that one forward of the target yields: 1 without a speculator."""
        return self.tokens / max(1, self.steps)

    def rates(self) -> list[float]:
        """Share of right drafts at each place."""
        return [r / max(1, t) for r, t in zip(self.right, self.tried, strict=True)]

    def add(self, other: Acceptance) -> None:
        """Sum up."""
        self.steps += other.steps
        self.tokens += other.tokens
        self.tried = [a + b for a, b in zip(self.tried, other.tried, strict=True)]
        self.right = [a + b for a, b in zip(self.right, other.right, strict=True)]


@torch.no_grad()
def acceptance(model: SpeculatorPair, batch: Batch, targets: Tensor) -> Acceptance:
    """Simulate greedy speculation over the trained tokens of a batch."""
    drafted = model.drafted(batch)
    head = model.speculator.head_weight(model.head_weight())
    wanted = [ahead(targets, batch, i + 1, IGNORE) for i in range(len(drafted))]
    exists = torch.stack([w != IGNORE for w in wanted])
    guesses = model.speculator.tokens_of(torch.stack([_argmax(d, head) for d in drafted]))
    right = (guesses == torch.stack(wanted)) & exists
    runs = right.int().cumprod(0).sum(0)
    found = Acceptance(0, 0, exists.sum(1).tolist(), right.sum(1).tolist())
    for begin, end in itertools.pairwise(batch.query_starts.tolist()):
        trained = (targets[begin:end] != IGNORE).nonzero().flatten().tolist()
        if trained:
            _walk(found, runs.tolist(), begin + trained[0], begin + trained[-1])
    return found


def _walk(found: Acceptance, runs: list[int], first: int, last: int) -> None:
    """From the position that predicts the first trained token to the last one's."""
    t = first
    while t <= last:
        gained = min(1 + runs[t], last - t + 1)
        found.steps += 1
        found.tokens += gained
        t += gained


def _argmax(rows: Tensor, head: Tensor) -> Tensor:
    """Best token of every row [T], a chunk of logits at a time."""
    packed = ops.pack_weight(head.detach())
    parts = [
        ops.logits(part.contiguous(), packed, len(head)).argmax(-1)
        for part in torch.split(rows, _ARGMAX_ROWS)
    ]
    return torch.cat(parts)
