"""A trained reward model as a reward: its number at the last token of prompt and completion."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sterna.align.memory.away import Frozen
from sterna.align.reward import Sample
from sterna.align.score import ended_batch, micro_batches, shares_prompts
from sterna.model.value import ValueModel


class ModelReward:
    """Reads the rollout's own token ids, so its tokenizer has to be the policy's."""

    name = "model"

    def __init__(self, frozen: Frozen, micro_tokens: int) -> None:
        assert isinstance(frozen.model, ValueModel), "a reward model has a score"
        self._frozen = frozen
        self._model = frozen.model
        self._device = frozen.model.device
        self._micro_tokens = micro_tokens

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """The score at the last token, which is the end token where one was generated."""
        found: list[float] = []
        with self._frozen.here():
            rollouts, shares = [sample.rollout for sample in samples], shares_prompts(self._model)
            for part in micro_batches(rollouts, self._micro_tokens, shares):
                asked = ended_batch(self._model, part, self._device)
                found.extend(self._model.values(asked.batch)[asked.rows].tolist())
        return found
