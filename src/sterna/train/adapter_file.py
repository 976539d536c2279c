"""Adapters as PEFT's files: written, and put on a decoder to be trained (see model/peft.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from sterna.core.errors import ConfigError
from sterna.core.rundir import write_atomic
from sterna.model.peft import CONFIG_NAME, PREFIX, ROLES, WEIGHTS_NAME, PeftFile, read_peft
from sterna.parallel.fsdp import full
from sterna.train.adapter import (
    AnyDecoder,
    adaptable,
    adapted_modules,
    finish_adapter,
    layer_of,
    place_part,
)
from sterna.train.adapter_config import AdapterConfig
from sterna.train.adapter_foreign import is_transposed
from sterna.train.adapter_modules import AdapterPart


def save_adapter(decoder: AnyDecoder, folder: Path, base_model: str = "") -> None:
    """Write the adapter of `decoder` to `folder`; `base_model` is noted in the config.

    Each file appears whole. ConfigError when there is no adapter.
    """
    for name, content in adapter_files(decoder, base_model).items():
        write_atomic(folder / name, content)


def adapter_files(decoder: AnyDecoder, base_model: str = "") -> dict[str, bytes]:
    """File name -> content of an adapter's files. ConfigError when there is no adapter.

    Of an adapter that is cut over ranks, every rank calls it.
    """
    parts = [p for _, module in adapted_modules(decoder) for p in module.adapters()]
    if not parts:
        raise ConfigError("this model has no adapter to save; add one first")
    text = json.dumps(_peft_config(decoder, parts, base_model), indent=2, sort_keys=True)
    return {
        WEIGHTS_NAME: save(_tensors(parts), metadata={"format": "pt"}),
        CONFIG_NAME: (text + "\n").encode(),
    }


def load_adapter(decoder: AnyDecoder, folder: Path) -> AdapterConfig:
    """Put the adapter of a folder on `decoder`, ready to train on or to merge; returns its config.

    Raises ModelFileError for a missing, damaged or unfitting file, UnsupportedModelError for an
    option of PEFT that is not supported, ConfigError for a second adapter.
    """
    if any(True for _ in adapted_modules(decoder)):
        raise ConfigError("this model has an adapter already; merge it first")
    found = read_peft(folder)
    config = _config(found)
    targets = {target.span.name: target for target in adaptable(decoder)}
    for name, tensors in found.modules.items():
        if name not in targets:
            leaves = {target.span.leaf for target in targets.values()}
            raise found.unknown(name, leaves, decoder.config.num_hidden_layers)
        rank = tensors["A"].shape[0]
        part = place_part(decoder, targets[name], config, rank, found.alpha(name))
        _fill(part, found)
    finish_adapter(decoder, config)
    return config


def _tensors(parts: list[AdapterPart]) -> dict[str, Tensor]:
    tensors = {}
    for part in parts:
        for suffix, role in ROLES.items():
            value = getattr(part, role)
            if value is not None:
                whole = full(value.detach())
                tensors[f"{PREFIX}{part.span.name}.{suffix}"] = whole.cpu().contiguous()
    return tensors


def _peft_config(decoder: AnyDecoder, parts: list[AdapterPart], base_model: str) -> dict[str, Any]:
    first = parts[0]
    ranks = {p.span.name: p.rank for p in parts if p.rank != first.rank}
    alphas = {p.span.name: _number(p.alpha) for p in parts if p.alpha != first.alpha}
    is_rslora = abs(first.scaling * first.rank - first.alpha) > 1e-6 * first.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": _number(first.alpha),
        "lora_dropout": first.dropout,
        "use_rslora": is_rslora,
        "use_dora": first.magnitude is not None,
        "bias": "none",
        "fan_in_fan_out": any(is_transposed(m.base) for _, m in adapted_modules(decoder)),
        "init_lora_weights": True,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        **_named_targets(decoder),
    }


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _named_targets(decoder: AnyDecoder) -> dict[str, Any]:
    """target_modules (short names where every named layer has them) and layers_to_transform."""
    by_layer: dict[int, set[str]] = {}
    for name, module in adapted_modules(decoder):
        leaves = by_layer.setdefault(layer_of(name), set())
        leaves.update(part.span.leaf for part in module.adapters())
    sets = {frozenset(leaves) for leaves in by_layer.values()}
    if len(sets) > 1:
        names = [p.span.name for _, m in adapted_modules(decoder) for p in m.adapters()]
        return {"target_modules": sorted(names), "layers_to_transform": None}
    layers = sorted(by_layer)
    is_all = len(layers) == decoder.config.num_hidden_layers
    return {
        "target_modules": sorted(next(iter(sets))),
        "layers_to_transform": None if is_all else layers,
    }


def _config(found: PeftFile) -> AdapterConfig:
    leaves = sorted({module.rpartition(".")[2] for module in found.modules})
    return AdapterConfig(
        kind="dora" if found.is_dora else "lora",
        rank=int(found.config.get("r", 8)),
        alpha=float(found.config.get("lora_alpha", 8)),
        is_rslora=found.is_rslora,
        dropout=float(found.config.get("lora_dropout") or 0.0),
        targets=tuple(leaves),
        layers=tuple(sorted({_layer(module) for module in found.modules})),
    )


def _layer(module: str) -> int:
    """The block a Hugging Face module name belongs to; ModelFileError elsewhere: no such part."""
    numbers = re.findall(r"\.(\d+)\.", module)
    return int(numbers[0]) if numbers else 0


def _fill(part: AdapterPart, found: PeftFile) -> None:
    for role, tensor in found.modules[part.span.name].items():
        parameter = getattr(part, role)
        if parameter.shape != tensor.shape:
            raise found.unfitting(part.span.name, role, tuple(parameter.shape))
        with torch.no_grad():
            parameter.copy_(tensor)
