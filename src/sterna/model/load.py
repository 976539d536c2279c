"""load_model: a folder or a GGUF file becomes a decoder, ready to train or to prepare."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from sterna.core.errors import (
    ConfigError,
    ModelFileError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from sterna.core.gguf import read_gguf
from sterna.core.lookup import unknown
from sterna.kernels.load import load_kernels
from sterna.model.config import ModelConfig, as_token_ids, parse_config
from sterna.model.decoder import Decoder
from sterna.model.families import Names
from sterna.model.gguf_config import config_from_gguf
from sterna.model.gguf_weights import GGUFSource
from sterna.model.hf_weights import SafetensorsSource
from sterna.model.swiftkv import new_decoder
from sterna.model.weights import TensorSource, assign

DTypeName = Literal["bfloat16", "float32", "float16"]
DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A decoder with its weights, its config and the folder or file it came from."""

    decoder: Decoder
    config: ModelConfig
    source: Path


def load_model(
    path: str | Path, dtype: DTypeName = "bfloat16", device: str | torch.device = "cpu"
) -> LoadedModel:
    """Load a Hugging Face folder or a .gguf file; also chooses the kernels of this process.

    Raises ModelNotFoundError, ModelFileError or UnsupportedModelError, each naming the file, what
    was found and what is supported; ConfigError for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ConfigError(unknown("dtype", dtype, DTYPES), param="dtype")
    load_kernels()
    path = Path(path)
    config, source, names = open_checkpoint(path)
    decoder = new_decoder(config, DTYPES[dtype], "meta", rope_device=device)
    assign(decoder, source, names, torch.device(device))
    return LoadedModel(decoder, config, path)


def load_config(path: str | Path) -> ModelConfig:
    """The config alone, without weights; same errors as `load_model`."""
    path = Path(path)
    if path.suffix == ".gguf":
        return parse_config(config_from_gguf(read_gguf(path))[1], str(path))
    return _folder_config(path)


def open_checkpoint(path: Path) -> tuple[ModelConfig, TensorSource, Names]:
    """A checkpoint's config, its tensors and the names it gives them; errors as `load_model`."""
    if not path.exists():
        raise ModelNotFoundError(f"{path}: no such file or folder; give a model folder or a .gguf")
    if path.is_dir():
        config = _folder_config(path)
        _refuse_quantised(config, path)
        return untied_if_stored(config, SafetensorsSource(path))
    if path.suffix != ".gguf":
        raise ModelFileError(
            f"{path}: a {path.suffix or 'nameless'} file; supported: a folder with config.json and "
            "safetensors files, or a .gguf file"
        )
    file = read_gguf(path)
    family, hf = config_from_gguf(file)
    config = parse_config(hf, str(path))
    return config, GGUFSource(file, config), family.gguf_names


def quant_method(config: ModelConfig) -> str | None:
    """Who quantised a folder's weights ("sterna", "gptq", "awq", ...), None = nobody."""
    section = config.hf.get("quantization_config") or {}
    return str(section.get("quant_method", "unnamed")) if section else None


def _refuse_quantised(config: ModelConfig, path: Path) -> None:
    method = quant_method(config)
    if method is not None:
        raise UnsupportedModelError(
            f"{path}: its weights are quantised ({method}), plain ones are needed here; serve it "
            "as it is, or write plain weights with `sterna dequantize`"
        )


def untied_if_stored(
    config: ModelConfig, source: SafetensorsSource
) -> tuple[ModelConfig, SafetensorsSource, Names]:
    """A checkpoint without lm_head ties it, whatever its config says."""
    if not config.tie_word_embeddings and not source.has("lm_head.weight"):
        config = replace(config, tie_word_embeddings=True)
    return config, source, config.hf_names


def _folder_config(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    if not path.exists():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ModelFileError(
            f"{folder}: no config.json (found {found}); needed: config.json and safetensors files"
        )
    config = parse_config(read_config_json(path), str(path))
    generation = folder / "generation_config.json"
    ids = read_config_json(generation).get("eos_token_id") if generation.exists() else None
    merged = dict.fromkeys((*as_token_ids(ids), *config.eos_token_ids))
    return replace(config, eos_token_ids=tuple(merged))


def read_config_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelFileError when it is missing or holds something else."""
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ModelFileError(f"{path}: not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: holds a {type(value).__name__}, an object is needed")
    return value
