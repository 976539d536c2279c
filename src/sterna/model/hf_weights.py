"""Hugging Face folders as a TensorSource: safetensors shards, mapped rather than read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sterna.core.errors import ModelFileError, UnsupportedModelError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class SafetensorsSource:
    """Reads tensors of a folder's shards under their Hugging Face names.

    Tensors already in the asked dtype are views of the mapped file: they cost no memory until
    written to (the mapping is private).
    """

    def __init__(self, folder: Path) -> None:
        self.label = str(folder)
        self._shard_of: dict[str, Any] = {}
        for path in _shards(folder):
            shard = _open(path)
            self._shard_of.update(dict.fromkeys(shard.keys(), shard))

    def has(self, name: str) -> bool:
        """Whether some shard holds the tensor."""
        return self._stored_name(name) is not None

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """See TensorSource."""
        tensor = self.stored(name)
        if not tensor.is_floating_point() or tensor.element_size() == 1:
            raise UnsupportedModelError(
                f"{self.label}: tensor {name!r} has dtype {tensor.dtype}; supported: float64, "
                "float32, float16, bfloat16 (quantised checkpoints are not)"
            )
        return tensor.to(dtype)

    def stored(self, name: str) -> Tensor:
        """The tensor as it is stored. Raises ModelFileError when it is missing."""
        stored = self._stored_name(name)
        if stored is None:
            raise ModelFileError(
                f"{self.label}: tensor {name!r} is in no safetensors file; fetch the model again"
            )
        tensor: Tensor = self._shard_of[stored].get_tensor(stored)
        return tensor

    def _stored_name(self, name: str) -> str | None:
        """Multimodal checkpoints put the language model one level deeper, base models higher."""
        inner = name.removeprefix("model.")
        spellings = (name, f"language_model.{name}", f"model.language_model.{inner}", inner)
        return next((spelling for spelling in spellings if spelling in self._shard_of), None)


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    if index.exists():
        names = sorted(set(_weight_map(index).values()))
        return [folder / name for name in names]
    if (folder / SINGLE_NAME).exists():
        return [folder / SINGLE_NAME]
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    found = f"only {', '.join(others)} (pickle is not read)" if others else "no weights"
    raise ModelFileError(
        f"{folder}: found {found}; needed: {SINGLE_NAME}, or shards listed in {INDEX_NAME}"
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise ModelFileError(f"{index}: not a safetensors index ({error}); fetch again") from error
    return weight_map


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: missing, but the index lists it; fetch it again") from error
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ModelFileError(
            f"{path}: truncated or damaged safetensors file of {size:,} bytes ({error}); "
            "fetch it again"
        ) from error
