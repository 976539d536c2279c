"""An experience as one safetensors file, and back: what a step was trained on, for replay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sterna.align.experience import Experience
from sterna.align.flat import Layout
from sterna.align.reward import Rewards
from sterna.align.rollout import Rollout
from sterna.core.errors import TrainError
from sterna.core.rundir import write_atomic

_VERSION = "1"
_OPTIONAL = ("ref_logprobs", "values", "returns")


def write_dump(path: Path, experience: Experience, figures: Mapping[str, float]) -> None:
    """Write it atomically; `figures` are what the step logged (its gradient norm above all)."""
    rollouts = experience.rollouts
    tensors: dict[str, Tensor] = {
        "starts": experience.layout.starts,
        "mask": experience.layout.mask.to(torch.uint8),
        "prompt_starts": _starts([len(r.prompt) for r in rollouts]),
        "prompts": _joined([r.prompt for r in rollouts]),
        "completions": _joined([r.completion for r in rollouts]),
        "rollout_mask": _joined([r.mask.astype(np.uint8) for r in rollouts], np.uint8),
        "scores": experience.scores,
        "rollout_logprobs": experience.rollout_logprobs,
        "old_logprobs": experience.old_logprobs,
        "advantages": experience.advantages,
        "total": experience.rewards.total,
        **{f"rewards/{name}": values for name, values in experience.rewards.parts.items()},
    }
    for name in _OPTIONAL:
        value = getattr(experience, name)
        if value is not None:
            tensors[name] = value
    each = [[r.prompt_idx, r.sample_idx, r.policy_version, int(r.is_truncated)] for r in rollouts]
    meta = {"version": _VERSION, "rollouts": json.dumps(each), "figures": json.dumps(dict(figures))}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save({k: v.clone() for k, v in tensors.items()}, meta))


def read_dump(path: Path) -> tuple[Experience, dict[str, float]]:
    """(the experience, the step's figures). TrainError for another kind of file."""
    try:
        with safe_open(path, "pt") as file:
            meta: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise TrainError(f"{path}: no dump of rollouts ({error})") from error
    if meta.get("version") != _VERSION:
        raise TrainError(f"{path}: no dump of rollouts of version {_VERSION}")
    layout = Layout(tensors["starts"], tensors["mask"].bool())
    parts = {n.removeprefix("rewards/"): t for n, t in tensors.items() if n.startswith("rewards/")}
    rollouts = _rollouts(json.loads(meta["rollouts"]), tensors)
    kept = torch.ones(len(rollouts), dtype=torch.bool)
    experience = Experience(
        rollouts=rollouts,
        layout=layout,
        rewards=Rewards(tensors["total"], parts, kept),
        scores=tensors["scores"],
        rollout_logprobs=tensors["rollout_logprobs"],
        old_logprobs=tensors["old_logprobs"],
        ref_logprobs=None,
        values=None,
        returns=None,
        advantages=tensors["advantages"],
    )
    optional = {name: tensors[name] for name in _OPTIONAL if name in tensors}
    figures: dict[str, float] = json.loads(meta["figures"])
    return replace(experience, **optional), figures


def _rollouts(each: list[list[int]], tensors: Mapping[str, Tensor]) -> tuple[Rollout, ...]:
    starts, prompt_starts = tensors["starts"].tolist(), tensors["prompt_starts"].tolist()
    found = []
    for i, (prompt_idx, sample_idx, version, is_truncated) in enumerate(each):
        own = slice(starts[i], starts[i + 1])
        asked = slice(prompt_starts[i], prompt_starts[i + 1])
        found.append(
            Rollout(
                prompt_idx=prompt_idx,
                sample_idx=sample_idx,
                prompt=tensors["prompts"][asked].numpy(),
                completion=tensors["completions"][own].numpy(),
                mask=tensors["rollout_mask"][own].numpy().astype(np.bool_),
                logprobs=tensors["rollout_logprobs"][own].numpy(),
                policy_version=version,
                is_truncated=bool(is_truncated),
            )
        )
    return tuple(found)


def _starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def _joined(parts: list[np.ndarray], dtype: type = np.int32) -> Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype))
