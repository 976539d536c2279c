"""Finished completions, and how they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sterna.align.flat import Layout, layout_of


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One completion of one prompt; C tokens, the end token included where it was generated.

    `prompt_idx` is the prompt's place in the step, so equal ones are a group. `logprobs` are those
    of the sampling distribution (temperature, top-p support) under the weights of
    `policy_version`. `mask` is false on tokens that the policy did not write (tool output).
    """

    prompt_idx: int
    sample_idx: int
    prompt: NDArray[np.int32]
    completion: NDArray[np.int32]
    mask: NDArray[np.bool_]
    logprobs: NDArray[np.float32]
    policy_version: int
    is_truncated: bool  # ended by length, not by an end token or stop string
    tool_calls: int = 0  # that were answered
    tool_errors: int = 0  # of these, with an error

    def turns(self) -> list[tuple[int, int]]:
        """(begin, end) in the completion of each stretch that the policy wrote."""
        edges = np.flatnonzero(np.diff(np.concatenate([[0], self.mask.astype(np.int8), [0]])))
        return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]

    @property
    def num_tokens(self) -> int:
        """Prompt and completion."""
        return len(self.prompt) + len(self.completion)


def completion_layout(rollouts: Sequence[Rollout]) -> Layout:
    """The completions side by side, in this order."""
    lengths = [len(rollout.completion) for rollout in rollouts]
    masks = [rollout.mask for rollout in rollouts]
    mask = np.concatenate(masks) if masks else np.zeros(0, np.bool_)
    return layout_of(lengths, torch.from_numpy(mask))


def rollout_logprobs(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """[N] float32: what the engine said of each completion token."""
    found = [rollout.logprobs for rollout in rollouts]
    return torch.from_numpy(np.concatenate(found) if found else np.zeros(0, np.float32))


def group_ids(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """[B] int64: which prompt each completion belongs to."""
    return torch.tensor([rollout.prompt_idx for rollout in rollouts], dtype=torch.int64)
