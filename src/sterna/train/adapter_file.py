"""Adapters as PEFT's files: adapter_model.safetensors and adapter_config.json, in and out.

Tensor names are `base_model.model.MODULE.lora_A.weight`, `.lora_B.weight` and, for DoRA,
`.lora_magnitude_vector`, MODULE being the Hugging Face name of the projection. What is in the file
decides what is adapted; the config gives the scaling. What PEFT can say and Sterna cannot do is
refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sterna.core.errors import ConfigError, ModelFileError, UnsupportedModelError
from sterna.core.rundir import write_atomic
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

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_PREFIX = "base_model.model."
_ROLES = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude"}
_PLAIN: Mapping[str, tuple[Any, ...]] = {  # keys of PEFT that must be unset, and how that looks
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False, True),  # PEFT notes Conv1D here; the module says it too
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "lora_bias": (None, False),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}


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
    peft = _read_config(folder / CONFIG_NAME)
    found = _grouped(_read_tensors(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME)
    config = _config(peft, found, folder / CONFIG_NAME)
    targets = {target.span.name: target for target in adaptable(decoder)}
    for name, tensors in found.items():
        if name not in targets:
            raise ModelFileError(
                f"{folder / WEIGHTS_NAME}: adapts {name!r}, which this model does not have; "
                f"it has {', '.join(sorted({t.span.leaf for t in targets.values()}))} in "
                f"{decoder.config.num_hidden_layers} layers"
            )
        rank = tensors["A"].shape[0]
        part = place_part(decoder, targets[name], config, rank, _alpha(peft, name))
        _fill(part, tensors, folder / WEIGHTS_NAME)
    finish_adapter(decoder, config)
    return config


def _tensors(parts: list[AdapterPart]) -> dict[str, Tensor]:
    tensors = {}
    for part in parts:
        for suffix, role in _ROLES.items():
            value = getattr(part, role)
            if value is not None:
                whole = full(value.detach())
                tensors[f"{_PREFIX}{part.span.name}.{suffix}"] = whole.cpu().contiguous()
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


def _read_config(path: Path) -> dict[str, Any]:
    try:
        peft: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ModelFileError(
            f"{path}: missing; an adapter folder holds {CONFIG_NAME} and {WEIGHTS_NAME}"
        ) from error
    except ValueError as error:
        raise ModelFileError(f"{path}: not valid JSON ({error}); save the adapter again") from error
    if peft.get("peft_type") != "LORA":
        raise UnsupportedModelError(
            f"{path}: an adapter of kind {peft.get('peft_type')!r}; supported: LORA (also rank-"
            "stabilised and DoRA)"
        )
    for key, allowed in _PLAIN.items():
        if peft.get(key) not in allowed:
            raise UnsupportedModelError(
                f"{path}: {key} = {peft[key]!r} is not supported, only {allowed[-1]!r}; merge the "
                "adapter with PEFT and load the merged model",
                param=key,
            )
    return peft


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: missing (pickle files are not read)") from error
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path}: damaged safetensors file ({error})") from error
    return tensors


def _grouped(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """Module name -> role -> tensor. ModelFileError for what has no role or is half there."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        suffix = next((s for s in _ROLES if name.endswith("." + s)), None)
        if suffix is None or not name.startswith(_PREFIX):
            raise ModelFileError(
                f"{path}: tensor {name!r} is no part of an adapter on linear layers "
                f"(known: {_PREFIX}MODULE.{{{', '.join(_ROLES)}}}; adapters on embeddings and the "
                "head are not supported)"
            )
        module = name.removeprefix(_PREFIX).removesuffix("." + suffix)
        found.setdefault(module, {})[_ROLES[suffix]] = tensor
    for module, roles in found.items():
        if "A" not in roles or "B" not in roles:
            raise ModelFileError(f"{path}: {module} has {', '.join(roles)}; A and B are needed")
    if not found:
        raise ModelFileError(f"{path}: holds no tensor; save the adapter again")
    return found


def _config(
    peft: Mapping[str, Any], found: Mapping[str, Mapping[str, Tensor]], path: Path
) -> AdapterConfig:
    is_dora = bool(peft.get("use_dora"))
    if any(("magnitude" in roles) != is_dora for roles in found.values()):
        raise ModelFileError(
            f"{path}: use_dora = {is_dora}, but the magnitudes of the file say otherwise"
        )
    leaves = sorted({module.rpartition(".")[2] for module in found})
    return AdapterConfig(
        kind="dora" if is_dora else "lora",
        rank=int(peft.get("r", 8)),
        alpha=float(peft.get("lora_alpha", 8)),
        is_rslora=bool(peft.get("use_rslora")),
        dropout=float(peft.get("lora_dropout") or 0.0),
        targets=tuple(leaves),
        layers=tuple(sorted({_layer(module) for module in found})),
    )


def _layer(module: str) -> int:
    """The block a Hugging Face module name belongs to; ModelFileError elsewhere: no such part."""
    numbers = re.findall(r"\.(\d+)\.", module)
    return int(numbers[0]) if numbers else 0


def _alpha(peft: Mapping[str, Any], module: str) -> float:
    """alpha of a module: the first pattern that ends its name, as PEFT matches them."""
    for pattern, alpha in (peft.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(alpha)
    return float(peft.get("lora_alpha", 8))


def _fill(part: AdapterPart, tensors: Mapping[str, Tensor], path: Path) -> None:
    for role, tensor in tensors.items():
        parameter = getattr(part, role)
        if parameter.shape != tensor.shape:
            raise ModelFileError(
                f"{path}: {part.span.name} has {role} of shape {tuple(tensor.shape)}, this model "
                f"asks for {tuple(parameter.shape)}; the adapter is of another model"
            )
        with torch.no_grad():
            parameter.copy_(tensor)
