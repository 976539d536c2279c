"""What makes a model a SwiftKV one: its settings, its groups, its names. See swiftkv.py.

A checkpoint is the original folder without the replaced projections, under an architecture and
model_type of its own, so that nothing else loads it as the original:

    config.json    architectures ["LlamaSwiftKVForCausalLM"], model_type "llama_swiftkv",
                   swiftkv {version, num_key_value_layers, key_value_group_size, architecture,
                   model_type}
    tensors        model.norm_swiftkv, model.layers.{i}.self_attn.{q,k,v}_proj_swiftkv

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sterna.core.errors import ConfigError, ModelFileError

if TYPE_CHECKING:
    from sterna.model.config import ModelConfig
    from sterna.model.families import Names

SECTION, VERSION = "swiftkv", 1
_MARK, _END = "SwiftKV", "ForCausalLM"


@dataclass(frozen=True, slots=True)
class SwiftKVConfig:
    """k: layers that run on every token; group size: later layers that share keys and values."""

    num_key_value_layers: int
    key_value_group_size: int = 1

    def check(self, config: ModelConfig) -> None:
        """ConfigError for a k that leaves no layer before or after it, or an impossible group."""
        layers, k = config.num_hidden_layers, self.num_key_value_layers
        if not 1 <= k < layers:
            raise ConfigError(
                f"num_key_value_layers is {k}; of {layers} layers 1 to {layers - 1} can be kept"
            )
        if self.key_value_group_size < 1:
            raise ConfigError(
                f"key_value_group_size is {self.key_value_group_size}; 1 (no sharing) or more"
            )

    def line(self, num_layers: int) -> str:
        """For people: which layers a prompt token runs, and how many later ones share a cache."""
        size = self.key_value_group_size
        shared = f", groups of {size} share keys and values" if size > 1 else ""
        return f"{self.num_key_value_layers} of {num_layers} (SwiftKV{shared})"


def owners(config: ModelConfig, swift: SwiftKVConfig) -> dict[int, int]:
    """Layer -> the layer whose keys and values it reads, for every layer from k on."""
    found: dict[int, int] = {}
    first, size = -1, 0
    for i in range(swift.num_key_value_layers, config.num_hidden_layers):
        is_full = first < 0 or size == swift.key_value_group_size
        if is_full or config.layer_ropes[i] != config.layer_ropes[first]:
            first, size = i, 0
        found[i] = first
        size += 1
    return found


def with_swiftkv(config: ModelConfig, swift: SwiftKVConfig) -> ModelConfig:
    """The config of the SwiftKV form of a model, config.json included.

    ConfigError for settings that do not fit the model.
    """
    swift.check(config)
    family = config.family
    section = {
        "version": VERSION,
        "num_key_value_layers": swift.num_key_value_layers,
        "key_value_group_size": swift.key_value_group_size,
        "architecture": family.architecture,
        "model_type": family.model_type,
    }
    text = config.hf.get("text_config", {})  # of a multimodal Gemma 3: the language model's part
    hf = {
        **{key: value for key, value in config.hf.items() if key != "text_config"},
        **text,
        "architectures": [family.architecture.removesuffix(_END) + _MARK + _END],
        "model_type": f"{family.model_type}_{SECTION}",
        SECTION: section,
    }
    return replace(config, swiftkv=swift, hf=hf)


def split_config(
    hf: Mapping[str, Any], source: str
) -> tuple[Mapping[str, Any], SwiftKVConfig | None]:
    """A config.json as that of the original model, and its SwiftKV settings if it has any.

    ModelFileError, naming `source`, for a section of another version or without its entries.
    """
    section = hf.get(SECTION)
    if section is None:
        return hf, None
    if not isinstance(section, dict) or section.get("version") != VERSION:
        raise ModelFileError(
            f"{source}: section {SECTION!r} is {section!r}; this version of Sterna reads version "
            f"{VERSION} of it: convert the original model again"
        )
    try:
        swift = SwiftKVConfig(section["num_key_value_layers"], section["key_value_group_size"])
        base = {"architectures": [section["architecture"]], "model_type": section["model_type"]}
    except KeyError as error:
        raise ModelFileError(
            f"{source}: section {SECTION!r} has no {error}; convert the original model again"
        ) from error
    return {**hf, **base}, swift


def swiftkv_names(config: ModelConfig, swift: SwiftKVConfig) -> Names:
    """The family's checkpoint names with those of SwiftKV's own tensors.

    `kv_swiftkv` stacks the keys and values of every group, in the order of their layers.
    """
    names = config.family.hf_names
    q, *_ = names["layers.{i}.attn.qkv"]
    prefix = q.rpartition(".")[0]  # ...layers.{i}.self_attn
    model = names["norm"][0].rpartition(".")[0]
    groups = dict.fromkeys(owners(config, swift).values())
    return {
        **names,
        "norm_swiftkv": (f"{model}.norm_swiftkv",),
        "layers.{i}.attn.q_swiftkv": (f"{prefix}.q_proj_swiftkv",),
        "kv_swiftkv": tuple(
            f"{prefix.replace('{i}', str(owner))}.{part}_proj_swiftkv"
            for owner in groups
            for part in "kv"
        ),
    }
