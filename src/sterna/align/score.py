"""Log-probs of completions under a model in training: the forward of the engine, with a graph.

Prompt and completion stand side by side without padding, as in any Batch; only the rows that
predict a completion token reach the head. A group's prompt is computed once: its completions read
its keys and values (`Batch.shared`), and what they owe to it flows back summed. On the CPU the
values are the engine's to the bit, shared or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sterna.align.rollout import Rollout
from sterna.kernels.scores import Distribution
from sterna.model.batch import Batch, SharedKeys
from sterna.train.longseq.head import chunked_logprobs
from sterna.train.step import TrainModel

IntArray = NDArray[Any]


def rollout_batch(rollouts: Sequence[Rollout], device: torch.device) -> Batch:
    """The rollouts as one flat Batch of whole sequences."""
    return _batch([np.concatenate([r.prompt, r.completion]) for r in rollouts], device)


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """A Batch and the rows of it that are asked for, in rollout order."""

    batch: Batch
    rows: Tensor  # int64: [N] before each completion token, or [B] the last of each rollout


def shares_prompts(model: Any) -> bool:
    """Whether `model` computes a group's prompt once; models behind transformers do not."""
    return bool(getattr(model, "reads_shared_keys", False))


def scored_batch(model: Any, rollouts: Sequence[Rollout], device: torch.device) -> ScoredBatch:
    """What `model` has to run to predict every completion token, and nothing else.

    The prompt of completions that follow each other is in it once, where the model can do that;
    last tokens predict nothing and are left out. A row's bits do not depend on either.
    """
    if not shares_prompts(model):
        rows, begin = [], 0
        for rollout in rollouts:
            first = begin + len(rollout.prompt) - 1
            rows.append(np.arange(first, first + len(rollout.completion)))
            begin += rollout.num_tokens
        return ScoredBatch(rollout_batch(rollouts, device), _int64(rows, device))
    layout = _Layout()
    for group in _groups(rollouts):
        layout.add(group)
    return layout.batch(device)


def ended_batch(model: Any, rollouts: Sequence[Rollout], device: torch.device) -> ScoredBatch:
    """What `model` has to run to say something of each rollout at its last token."""
    if not shares_prompts(model):
        batch = rollout_batch(rollouts, device)
        return ScoredBatch(batch, batch.query_starts[1:].long() - 1)
    layout = _Layout()
    for group in _groups(rollouts):
        layout.add_whole(group)
    return layout.batch(device)


@dataclass(slots=True)
class _Layout:
    """Sequences of a batch as they are laid out; a prefix is a sequence of its own."""

    sequences: list[IntArray] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # position of the first token of each
    keys: list[IntArray] = field(default_factory=list)  # the rows that each sees
    rows: list[IntArray] = field(default_factory=list)
    size: int = 0

    def add(self, group: Sequence[Rollout]) -> None:
        """Completions of one prompt."""
        if len(group) == 1:
            whole = np.concatenate([group[0].prompt, group[0].completion])[:-1]
            self._predict(self._append(whole), len(group[0].prompt) - 1, group[0])
            return
        prefix = self._append(group[0].prompt)
        for rollout in group:
            own = self._append(rollout.completion[:-1], prefix)
            first = prefix[-1:] if len(rollout.completion) else own
            self.rows.append(np.concatenate([first, own]))

    def add_whole(self, group: Sequence[Rollout]) -> None:
        """Completions of one prompt, their last tokens too; those rows are asked for."""
        prefix = self._append(group[0].prompt)
        for rollout in group:
            own = self._append(rollout.completion, prefix)
            self.rows.append((own if len(own) else prefix)[-1:])

    def batch(self, device: torch.device) -> ScoredBatch:
        """All of it; without a shared prefix an ordinary batch."""
        batch = _batch(self.sequences, device, self.offsets)
        if any(self.offsets):
            starts = np.concatenate([[0], np.cumsum([len(keys) for keys in self.keys])])
            shared = SharedKeys(_int32(np.concatenate(self.keys), device), _int32(starts, device))
            batch = replace(batch, shared=shared)
        return ScoredBatch(batch, _int64(self.rows, device))

    def _append(self, tokens: IntArray, prefix: IntArray | None = None) -> IntArray:
        """The rows of a new sequence, behind the keys of `prefix`; none where it has no token."""
        own = np.arange(self.size, self.size + len(tokens))
        if not len(tokens):
            return own
        self.sequences.append(tokens)
        self.offsets.append(0 if prefix is None else len(prefix))
        self.keys.append(own if prefix is None else np.concatenate([prefix, own]))
        self.size += len(tokens)
        return own

    def _predict(self, own: IntArray, first: int, rollout: Rollout) -> None:
        self.rows.append(own[first : first + len(rollout.completion)])


def _groups(rollouts: Sequence[Rollout]) -> Iterator[list[Rollout]]:
    """Rollouts that follow each other and have one prompt."""
    group: list[Rollout] = []
    for rollout in rollouts:
        if group and not has_prompt_of(rollout, group[-1]):
            yield group
            group = []
        group.append(rollout)
    if group:
        yield group


def has_prompt_of(rollout: Rollout, other: Rollout | None) -> bool:
    """Whether both have one prompt."""
    return other is not None and np.array_equal(rollout.prompt, other.prompt)


def _batch(
    sequences: Sequence[IntArray], device: torch.device, offsets: Sequence[int] | None = None
) -> Batch:
    """Sequences side by side; `offsets`: where positions begin, and how many keys are elsewhere."""
    lengths = np.array([len(tokens) for tokens in sequences], np.int64)
    before = np.zeros_like(lengths) if offsets is None else np.array(offsets, np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1] - before, lengths)
    return Batch(
        tokens=_int32(np.concatenate(sequences), device),
        positions=_int32(positions, device),
        query_starts=_int32(starts, device),
        context_lens=_int32(lengths + before, device),
    )


def completion_logprobs(
    model: TrainModel,
    rollouts: Sequence[Rollout],
    distribution: Distribution | None = None,
    *,
    device: torch.device | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy) of every completion token [N] under `distribution` (None: plain).

    Differentiable. Tokens that are not trained are scored too: their weight is 0 in every loss.
    """
    where = device or torch.device("cpu")
    scored = scored_batch(model, rollouts, where)
    hidden = model.hidden(scored.batch)
    targets = np.concatenate([rollout.completion for rollout in rollouts]).astype(np.int64)
    return chunked_logprobs(
        hidden.index_select(0, scored.rows),
        model.head_weight(),
        torch.from_numpy(targets).to(where),
        softcap=float(getattr(model.config, "logits_softcap", 0.0)),
        bias=model.head_bias(),
        distribution=distribution or Distribution(),
        chunk_rows=chunk_rows,
    )


def micro_batches(
    rollouts: Sequence[Rollout], max_tokens: int, shares: bool = True
) -> list[list[Rollout]]:
    """The rollouts, in order, cut into parts of at most `max_tokens` tokens (at least one each).

    Where the model `shares` prompts, one counts once in a part if it is that of the rollout before.
    """
    parts: list[list[Rollout]] = []
    room = 0
    for rollout in rollouts:
        size = added_tokens(rollout, parts[-1][-1] if parts and shares else None)
        if not parts or size > room:
            parts.append([])
            room, size = max_tokens, rollout.num_tokens
        parts[-1].append(rollout)
        room -= size
    return parts


def added_tokens(rollout: Rollout, before: Rollout | None) -> int:
    """Tokens that a rollout adds to a batch behind `before`."""
    return len(rollout.completion) if has_prompt_of(rollout, before) else rollout.num_tokens


def _int32(values: IntArray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(device)


def _int64(parts: Sequence[IntArray], device: torch.device) -> Tensor:
    joined = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return torch.from_numpy(joined.astype(np.int64)).to(device)
