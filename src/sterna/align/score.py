"""Log-probs of completions under a model in training: the forward of the engine, with a graph.

Prompt and completion stand side by side without padding, as in any Batch; only the rows that
predict a completion token reach the head. On the CPU the values are the engine's to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sterna.align.rollout import Rollout
from sterna.kernels.scores import Distribution
from sterna.model.batch import Batch
from sterna.train.longseq.head import chunked_logprobs
from sterna.train.step import TrainModel


def rollout_batch(rollouts: Sequence[Rollout], device: torch.device) -> Batch:
    """The rollouts as one flat Batch of whole sequences."""
    lengths = np.array([rollout.num_tokens for rollout in rollouts], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    parts = [part for r in rollouts for part in (r.prompt, r.completion)]
    positions = np.arange(starts[-1], dtype=np.int64) - np.repeat(starts[:-1], lengths)
    return Batch(
        tokens=_int32(np.concatenate(parts), device),
        positions=_int32(positions, device),
        query_starts=_int32(starts, device),
        context_lens=_int32(lengths, device),
    )


def completion_rows(rollouts: Sequence[Rollout]) -> Tensor:
    """[N] int64: the row of the batch that predicts each completion token.

    Also the row whose value a critic is asked for: what is known before the token is chosen.
    """
    rows, begin = [], 0
    for rollout in rollouts:
        first = begin + len(rollout.prompt) - 1
        rows.append(np.arange(first, first + len(rollout.completion)))
        begin += rollout.num_tokens
    return torch.from_numpy(np.concatenate(rows) if rows else np.zeros(0, np.int64))


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
    hidden = model.hidden(rollout_batch(rollouts, where))
    targets = np.concatenate([rollout.completion for rollout in rollouts]).astype(np.int64)
    return chunked_logprobs(
        hidden.index_select(0, completion_rows(rollouts).to(where)),
        model.head_weight(),
        torch.from_numpy(targets).to(where),
        softcap=float(getattr(model.config, "logits_softcap", 0.0)),
        bias=model.head_bias(),
        distribution=distribution or Distribution(),
        chunk_rows=chunk_rows,
    )


def micro_batches(rollouts: Sequence[Rollout], max_tokens: int) -> list[list[Rollout]]:
    """The rollouts, in order, cut into parts of at most `max_tokens` tokens (at least one each)."""
    parts: list[list[Rollout]] = []
    room = 0
    for rollout in rollouts:
        if not parts or rollout.num_tokens > room:
            parts.append([])
            room = max_tokens
        parts[-1].append(rollout)
        room -= rollout.num_tokens
    return parts


def _int32(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(device)
