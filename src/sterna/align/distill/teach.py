"""The teacher of a run, and completions of the data that it teaches beside the student's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from sterna.align.config import RlRecipe
from sterna.align.critic import check_tokenizer
from sterna.align.draw import Draw
from sterna.align.experience import PerToken
from sterna.align.hybrid import Sampling
from sterna.align.prompts import Prompt
from sterna.align.rollout import Rollout
from sterna.core.errors import ConfigError, RowError
from sterna.data.order import uniform
from sterna.model.decoder import Decoder
from sterna.model.hub import resolve_model
from sterna.model.load import load_model
from sterna.text.tokenizer import Tokenizer


def load_teacher(recipe: RlRecipe, policy: Decoder, tokenizer: Tokenizer) -> Decoder:
    """Frozen. ConfigError for another tokenizer, or another vocabulary size in the full loss."""
    path = resolve_model(recipe.distill.teacher)
    check_tokenizer(path, tokenizer, "distill.teacher")
    device = torch.device(recipe.model.device)
    teacher = load_model(path, recipe.model.dtype, device).decoder.requires_grad_(False)
    ours, theirs = policy.config.vocab_size, teacher.config.vocab_size
    if recipe.distill.loss == "full" and ours != theirs:
        raise ConfigError(
            f"the teacher has {theirs:,} logits and the student {ours:,} (padding, most likely); "
            'set distill.loss = "sampled"',
            param="distill.loss",
        )
    return teacher


class GivenDraw:
    """Draws a share of the prompts' completions from the rows: GKD's (1 - lambda).

    Their log-probs are asked of the student, so that figures read as if it had written them.
    """

    def __init__(self, inner: Draw, lmbda: float, tokenizer: Tokenizer, logprobs: PerToken) -> None:
        self._inner = inner
        self._lmbda = lmbda
        self._tokenizer = tokenizer
        self._logprobs = logprobs

    def __call__(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> list[Rollout]:
        """See Draw. RowError for a row without a `completion`."""
        own = [i for i, seed in enumerate(seeds) if uniform(seed, 13) < self._lmbda]
        drawn = self._inner(
            [prompts[i] for i in own], group_size, sampling, [seeds[i] for i in own]
        )
        found = {i: drawn[k * group_size : (k + 1) * group_size] for k, i in enumerate(own)}
        given = [
            self._given(prompt, i, sampling.max_tokens)
            for i, prompt in enumerate(prompts)
            if i not in found
        ]
        for rollout in self._scored(given):
            copies = [replace(rollout, sample_idx=j) for j in range(group_size)]
            found[rollout.prompt_idx] = copies
        return [replace(r, prompt_idx=i) for i in range(len(prompts)) for r in found[i]]

    def close(self) -> None:
        """See Draw."""
        self._inner.close()

    def _given(self, prompt: Prompt, index: int, max_tokens: int) -> Rollout:
        text = prompt.row.get("completion")
        if not isinstance(text, str) or not text:
            raise RowError(
                f"prompt {prompt.index} has no `completion` text; distill.lmbda < 1 trains on "
                "those of the rows"
            )
        tokens = self._tokenizer.encode(text, add_special_tokens=False)
        tokens = [*tokens, *self._tokenizer.eos_token_ids[:1]]
        kept = np.array(tokens[:max_tokens], np.int32)
        return Rollout(
            prompt_idx=index,
            sample_idx=0,
            prompt=prompt.tokens,
            completion=kept,
            mask=np.ones(len(kept), np.bool_),
            logprobs=np.zeros(len(kept), np.float32),
            policy_version=0,
            is_truncated=len(tokens) > max_tokens,
        )

    def _scored(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        values = self._logprobs(rollouts).numpy() if rollouts else np.zeros(0, np.float32)
        cuts = np.cumsum([len(rollout.completion) for rollout in rollouts])[:-1]
        parts = np.split(values, cuts)
        return [replace(r, logprobs=part) for r, part in zip(rollouts, parts, strict=False)]
