"""Saves Hugging Face folders (config.json, safetensors shards) that transformers reads back.

The dtype saved is the decoder's own, so a save and a load give the same bits. Files are written
beside their place and renamed, so that a crash leaves the old model whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sterna.core.errors import ModelError
from sterna.core.rundir import write_atomic
from sterna.model.decoder import Decoder
from sterna.model.hf_weights import INDEX_NAME, SINGLE_NAME
from sterna.model.weights import export

MAX_SHARD_BYTES = 4 * 2**30  # transformers' own limit is 5 GB; some file systems stop at 4 GiB


def save_model(
    decoder: Decoder, folder: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write config.json and the weights to `folder`, which is made when missing.

    Raises ModelError for a decoder whose weights are packed (`prepare_inference`): save first.
    """
    if any(parameter.dim() == 4 for parameter in decoder.parameters()):
        raise ModelError("this model is packed for inference; save it before prepare_inference")
    tensors = export(decoder, decoder.config.hf_names)
    save_tensors(tensors, hf_config(decoder), Path(folder), max_shard_bytes)


def save_tensors(
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    folder: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write named tensors and a config.json; no more than one shard is in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [
        _save_shard(folder / f".shard-{i}.{os.getpid()}", shard)
        for i, shard in enumerate(_shards(tensors, max_shard_bytes))
    ]
    names = _shard_names(len(written))
    for name, shard in zip(names, written, strict=True):
        os.replace(shard.path, folder / name)
    _write_index(folder, names, written)
    write_atomic(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def hf_config(decoder: Decoder) -> dict[str, Any]:
    """The config.json of a decoder: the one it was loaded with, and the dtype it has now."""
    config = decoder.config
    stale = ("torch_dtype", "dtype", "quantization_config")
    return {
        **{key: value for key, value in config.hf.items() if key not in stale},
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


@dataclass(frozen=True, slots=True)
class _Shard:
    """A written shard, not yet under its own name: that holds the number of shards."""

    path: Path
    tensors: tuple[str, ...]
    num_bytes: int


def _save_shard(path: Path, tensors: dict[str, Tensor]) -> _Shard:
    try:
        save_file(tensors, str(path), metadata={"format": "pt"})
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return _Shard(path, tuple(tensors), sum(tensor.nbytes for tensor in tensors.values()))


def _write_index(folder: Path, names: list[str], shards: list[_Shard]) -> None:
    """The index of a sharded checkpoint; a single file has none, and a stale one is removed."""
    path = folder / INDEX_NAME
    if len(names) == 1:
        path.unlink(missing_ok=True)
        return
    pairs = list(zip(names, shards, strict=True))
    weight_map = {tensor: name for name, shard in pairs for tensor in shard.tensors}
    total = sum(shard.num_bytes for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomic(path, json.dumps(index, indent=2) + "\n")
