"""A run's state as tensors and JSON, and back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sterna.parallel.mesh import Mesh
from sterna.train import checkpoint
from sterna.train.checkpoint import Snapshot
from sterna.train.parts import Parts
from sterna.train.state import Counters
from sterna.version import __version__


def take_snapshot(parts: Parts, counters: Counters, loader_state: dict[str, Any]) -> Snapshot:
    """A copy of everything, on the CPU, that later steps do not touch. All ranks call it.

    With offloaded states it is no copy: they are not for memory, so the write has to end first.
    """
    is_copy = not parts.optimizer.is_offloaded
    weights = parts.task.weights(parts.model)
    tensors = gathered(weights.tensors, parts.mesh, is_copy)
    state = {key: _on_cpu(tensor, is_copy) for key, tensor in state_tensors(parts).items()}
    meta = {
        "sterna": __version__,
        "world": {"dp": parts.mesh.dp.size, "sp": parts.mesh.sp.size},
        "counters": counters.as_dict(),
        "loader": loader_state,
        "recipe": parts.recipe.model_dump(mode="json"),
    }
    files = {**parts.files, **weights.files}
    return Snapshot(counters.step, tensors, weights.config, files, state, meta)


def gathered(
    tensors: Iterable[tuple[str, Tensor]], mesh: Mesh, is_copy: bool = True
) -> dict[str, Tensor]:
    """Copies of named tensors on the main rank; the others only take part in gathering shards."""
    kept = {}
    for name, tensor in tensors:
        if mesh.is_main:
            kept[name] = _on_cpu(tensor, is_copy)
    return kept


def restore(folder: Path, parts: Parts, counters: Counters) -> None:
    """Take over a checkpoint's state; the weights were read when the model was built."""
    meta = checkpoint.read_meta(folder)
    counters.load(meta["counters"])
    parts.loader.load_state_dict(meta["loader"])
    state = state_tensors(parts)
    checkpoint.load_state(folder, state)
    _set_rng(state, parts)


def state_tensors(parts: Parts) -> dict[str, Tensor]:
    """Optimizer, EMA and RNG tensors of this rank by key, themselves and not copies.

    Every rank's shards have keys of their own; what all ranks hold alike has one.
    """
    suffix = f"@{parts.mesh.rank}" if parts.shards.size > 1 else ""
    found = {
        f"optim/{name}/{key}{suffix}": tensor
        for name, states in parts.optimizer.state_dict().items()
        for key, tensor in states.items()
    }
    if parts.ema is not None:
        found |= {f"ema/{name}{suffix}": value for name, value in parts.ema.averages.items()}
    found[_rng_key(parts, "cpu")] = torch.get_rng_state()
    if parts.mesh.device.type == "cuda":
        found[_rng_key(parts, "cuda")] = torch.cuda.get_rng_state(parts.mesh.device)
    return {key: tensor for key, tensor in found.items() if tensor.numel()}


def _rng_key(parts: Parts, device: str) -> str:
    return f"rng/{device}@{parts.mesh.rank}"


def _set_rng(state: dict[str, Tensor], parts: Parts) -> None:
    torch.set_rng_state(state[_rng_key(parts, "cpu")])
    if parts.mesh.device.type == "cuda":
        torch.cuda.set_rng_state(state[_rng_key(parts, "cuda")], parts.mesh.device)


def _on_cpu(tensor: Tensor, is_copy: bool) -> Tensor:
    return tensor.detach().to("cpu", copy=is_copy)
