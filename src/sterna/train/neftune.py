"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings while training.

A token of a document of n tokens and hidden size d gets noise in +-alpha / sqrt(n d). Packed
documents keep their own n. Noise is a function of (seed, rank, step, micro-batch): it repeats after
a resume.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sterna.core.errors import ConfigError
from sterna.model.batch import Batch
from sterna.parallel.mesh import Axis
from sterna.parallel.shard_rows import chunk_of
from sterna.train import rounding


def embedding_of(model: nn.Module) -> nn.Module:
    """The module that turns tokens into the first hidden states."""
    named: Any = getattr(getattr(model, "model", None), "get_input_embeddings", None)
    found = named() if named is not None else getattr(model, "embed_tokens", None)
    if not isinstance(found, nn.Module):
        raise ConfigError(
            f"model.neftune_alpha is set, but {type(model).__name__} shows no embedding; "
            "set it to 0"
        )
    return found


class Neftune:
    """Adds noise to the output of an embedding module between `arm` and the next forward of it."""

    def __init__(self, embedding: nn.Module, alpha: float, seed: int, rank: int = 0) -> None:
        self._alpha = alpha
        self._words = (seed, rank)
        self._next: tuple[Batch, Axis | None, torch.Generator] | None = None
        embedding.register_forward_hook(self._add)

    def arm(self, batch: Batch, step: int, micro: int, sp: Axis | None = None) -> None:
        """Noise for the forward of `batch` that follows; `sp`: the ranks that share its row."""
        self._next = (batch, sp, rounding.generator(*self._words, step, micro))

    def _add(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self._next is None:
            return output
        (batch, sp, source), self._next = self._next, None
        lengths = batch.query_starts.diff().long()
        widths = self._alpha / (lengths * output.shape[-1]).double().sqrt()
        per_token = widths.repeat_interleave(lengths).to(torch.float32).cpu()
        if sp is not None:
            per_token = per_token[chunk_of(per_token.numel(), sp)]
        shape = (per_token.numel(), output.shape[-1])
        noise = (torch.rand(shape, generator=source) * 2 - 1) * per_token[:, None]
        return output + noise.to(output).view_as(output)
