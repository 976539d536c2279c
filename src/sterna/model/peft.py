"""Low-rank adapters in PEFT's files: adapter_model.safetensors and adapter_config.json, read.

Tensor names are `base_model.model.MODULE.lora_A.weight`, `.lora_B.weight` and, for DoRA,
`.lora_magnitude_vector`, MODULE being the Hugging Face name of the projection. What is in the file
decides what is adapted; the config gives the scaling. What PEFT can say and Sterna cannot do is
refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sterna.core.errors import ModelFileError, UnsupportedModelError

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."
ROLES: Mapping[str, str] = MappingProxyType(
    {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude"}
)
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


@dataclass(frozen=True, slots=True)
class PeftFile:
    """An adapter as stored: module name -> role ("A", "B", "magnitude") -> tensor."""

    weights_path: Path
    config: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, Tensor]]

    @property
    def is_dora(self) -> bool:
        """Whether output rows have a length of their own."""
        return bool(self.config.get("use_dora"))

    @property
    def is_rslora(self) -> bool:
        """Whether the scale is alpha / sqrt(rank) instead of alpha / rank."""
        return bool(self.config.get("use_rslora"))

    @property
    def max_rank(self) -> int:
        """The largest rank of a module."""
        return max(int(roles["A"].shape[0]) for roles in self.modules.values())

    def alpha(self, module: str) -> float:
        """alpha of a module: the first pattern that ends its name, as PEFT matches them."""
        for pattern, alpha in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(alpha)
        return float(self.config.get("lora_alpha", 8))

    def scale(self, module: str) -> float:
        """The factor on B A x of a module."""
        rank = int(self.modules[module]["A"].shape[0])
        return self.alpha(module) / (rank**0.5 if self.is_rslora else rank)

    def unfitting(self, module: str, role: str, wanted: tuple[int, ...]) -> ModelFileError:
        """The error for a tensor whose shape is not the model's."""
        shape = tuple(self.modules[module][role].shape)
        return ModelFileError(
            f"{self.weights_path}: {module} has {role} of shape {shape}, this model asks for "
            f"{wanted}; the adapter is of another model"
        )

    def unknown(self, module: str, leaves: set[str], num_layers: int) -> ModelFileError:
        """The error for a module that the model does not have."""
        return ModelFileError(
            f"{self.weights_path}: adapts {module!r}, which this model does not have; it has "
            f"{', '.join(sorted(leaves))} in {num_layers} layers"
        )


def read_peft(folder: Path) -> PeftFile:
    """The adapter in `folder`.

    ModelFileError for a missing, damaged or half file (pickles are not read), UnsupportedModelError
    for an option of PEFT that is not supported.
    """
    config = _read_config(folder / CONFIG_NAME)
    path = folder / WEIGHTS_NAME
    found = PeftFile(path, config, _grouped(_read_tensors(path), path))
    if any(("magnitude" in roles) != found.is_dora for roles in found.modules.values()):
        raise ModelFileError(
            f"{folder / CONFIG_NAME}: use_dora = {found.is_dora}, but the magnitudes of the file "
            "say otherwise"
        )
    return found


def _read_config(path: Path) -> dict[str, Any]:
    try:
        peft: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
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
        suffix = next((s for s in ROLES if name.endswith("." + s)), None)
        if suffix is None or not name.startswith(PREFIX):
            raise ModelFileError(
                f"{path}: tensor {name!r} is no part of an adapter on linear layers "
                f"(known: {PREFIX}MODULE.{{{', '.join(ROLES)}}}; adapters on embeddings and the "
                "head are not supported)"
            )
        module = name.removeprefix(PREFIX).removesuffix("." + suffix)
        found.setdefault(module, {})[ROLES[suffix]] = tensor
    for module, roles in found.items():
        if "A" not in roles or "B" not in roles:
            raise ModelFileError(f"{path}: {module} has {', '.join(roles)}; A and B are needed")
    if not found:
        raise ModelFileError(f"{path}: holds no tensor; save the adapter again")
    return found
