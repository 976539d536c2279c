"""ModelConfig: what a decoder is built from, in Hugging Face's words.

`parse_config` reads a config.json of transformers 4 or 5 (old `rope_scaling` keys or new
`rope_parameters`) of any family in `families.py`. GGUF metadata is first turned into the same
dictionary (see gguf_config.py), so there is one parser. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sterna.core.errors import ModelFileError, UnsupportedModelError
from sterna.core.lookup import unknown
from sterna.model.families import Family, Names, family_of_architecture
from sterna.model.rope_config import RopeConfig, parse_rope
from sterna.model.swiftkv_config import SwiftKVConfig, split_config, swiftkv_names

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_MAX_POSITIONS = "max_position_embeddings"
GATED_ACTIVATIONS = ("silu", "gelu_tanh")
_RENAMED = {  # other families' words for the same thing
    "hidden_activation": "hidden_act",
    "activation_function": "hidden_act",
    "ffn_dim": "intermediate_size",
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and options of one model. Names as in Hugging Face configs where one exists.

    `layer_windows[i]`: sliding window of layer i in tokens, 0 = full attention.
    `layer_ropes[i]`: index into `ropes`, -1 = no rotation (NoPE or learned positions).
    `hf`: the config.json this came from (or would have), written back on save.
    `swiftkv`: None for a plain model.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    has_qkv_bias: bool
    has_out_bias: bool
    attention_scale: float
    attention_softcap: float
    logits_softcap: float
    ropes: tuple[RopeConfig, ...]
    layer_ropes: tuple[int, ...]
    layer_windows: tuple[int, ...]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    hf: Mapping[str, Any] = field(repr=False, compare=False)
    swiftkv: SwiftKVConfig | None = None

    @property
    def hf_names(self) -> Names:
        """How a Hugging Face folder of this model names its tensors."""
        swift = self.swiftkv
        return self.family.hf_names if swift is None else swiftkv_names(self, swift)

    @property
    def embed_scale(self) -> float:
        """Factor on the embeddings, before rounding to the model's dtype."""
        return self.hidden_size**0.5 if self.family.has_scaled_embeddings else 1.0

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value weight."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @property
    def num_positions(self) -> int:
        """Longest sequence the positions are made for; YaRN stretches the trained length."""
        stretched = [rope.stretched_length for rope in self.ropes]
        return max([self.max_position_embeddings, *stretched])


def parse_config(hf: Mapping[str, Any], source: str) -> ModelConfig:
    """The ModelConfig of a config.json dictionary; `source` is named in errors.

    Raises UnsupportedModelError for an unknown architecture or option, ModelFileError for a
    missing or impossible value.
    """
    plain, swift = split_config(hf, source)
    text = _text_part(plain)
    family = family_of_architecture(_architecture(text, source), source)
    reader = _Reader({**family.hf_defaults, **_renamed(text)}, source)
    _refuse_unsupported(reader, family)
    config = replace(_build(reader, family, hf), swiftkv=swift)
    if swift is not None:
        swift.check(config)
    return config


def _build(reader: _Reader, family: Family, hf: Mapping[str, Any]) -> ModelConfig:
    num_layers = reader.size("num_hidden_layers")
    num_heads = reader.size("num_attention_heads")
    hidden_size = reader.size("hidden_size")
    head_dim = reader.size("head_dim", hidden_size // num_heads)
    windows = _layer_windows(reader, num_layers)
    ropes = _ropes(reader, family, head_dim)
    return ModelConfig(
        family=family,
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.size("intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=_kv_heads(reader, num_heads),
        head_dim=head_dim,
        max_position_embeddings=reader.size("max_position_embeddings", 2048),
        rms_norm_eps=float(reader.get("rms_norm_eps", 1e-6)),
        hidden_act=_activation(reader, family),
        tie_word_embeddings=bool(reader.get("tie_word_embeddings", False)),
        has_qkv_bias=family.has_qkv_bias or bool(reader.get("attention_bias", False)),
        has_out_bias=family.norm == "layer" or bool(reader.get("attention_bias", False)),
        attention_scale=float(reader.get("query_pre_attn_scalar", head_dim)) ** -0.5,
        attention_softcap=float(reader.get("attn_logit_softcapping", 0.0)),
        logits_softcap=float(reader.get("final_logit_softcapping", 0.0)),
        ropes=ropes,
        layer_ropes=_layer_ropes(reader, windows, len(ropes)),
        layer_windows=windows,
        bos_token_id=reader.get("bos_token_id", None),
        eos_token_ids=as_token_ids(reader.get("eos_token_id", None)),
        hf=hf,
    )


def as_token_ids(value: Any) -> tuple[int, ...]:
    """A config's token id (None, a number or a list of numbers) as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads values of a config; null counts as absent. Errors name the file."""

    values: Mapping[str, Any]
    source: str

    def get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or value < 1:
            raise ModelFileError(
                f"{self.source}: {key} is {value!r}; a positive whole number is needed", param=key
            )
        return value


def _text_part(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a multimodal Gemma 3 config; else the config itself."""
    if "Gemma3ForConditionalGeneration" not in (hf.get("architectures") or ()):
        return hf
    shared = {k: hf[k] for k in ("eos_token_id", "bos_token_id") if k in hf}
    return {**shared, **hf.get("text_config", {}), "architectures": ["Gemma3ForCausalLM"]}


def _architecture(hf: Mapping[str, Any], source: str) -> str:
    names = hf.get("architectures") or ()
    if not names:
        raise UnsupportedModelError(
            f"{source}: no `architectures` entry, so the model's kind is unknown; "
            'add for example "architectures": ["LlamaForCausalLM"]'
        )
    return str(names[0])


def _renamed(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Own words for the keys. An explicit null stays: it switches a family's default off."""
    renamed = {_RENAMED[key]: hf[key] for key in _RENAMED if hf.get(key) is not None}
    return {**hf, **renamed}


def _kv_heads(reader: _Reader, num_heads: int) -> int:
    count = reader.size("num_key_value_heads", num_heads)
    if num_heads % count:
        raise ModelFileError(
            f"{reader.source}: {num_heads} attention heads cannot share {count} key/value heads; "
            "the first must be a multiple of the second"
        )
    return count


def _activation(reader: _Reader, family: Family) -> str:
    name = reader.get("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f"{reader.source}: {unknown('activation', name, ACTIVATIONS)}")
    kind = ACTIVATIONS[name]
    if family.has_gated_mlp and kind not in GATED_ACTIVATIONS:
        raise UnsupportedModelError(
            f"{reader.source}: activation {name!r} in a gated MLP; supported: "
            f"{', '.join(GATED_ACTIVATIONS)}"
        )
    return kind


_UNSUPPORTED: tuple[tuple[str, tuple[Any, ...]], ...] = (  # key, the values that are supported
    ("mlp_bias", (False,)),
    ("do_layer_norm_before", (True,)),
    ("_remove_final_layer_norm", (False,)),
    ("enable_bias", (True,)),
    ("layer_norm_elementwise_affine", (True,)),
    ("use_bidirectional_attention", (False,)),
)


def _refuse_unsupported(reader: _Reader, family: Family) -> None:
    for key, allowed in _UNSUPPORTED:
        value = reader.get(key, allowed[0])
        if value not in allowed:
            raise UnsupportedModelError(
                f"{reader.source}: {key} = {value!r} is not supported for family {family.name}, "
                f"only {allowed[0]!r}",
                param=key,
            )
    projected = reader.get("word_embed_proj_dim", reader.get("hidden_size", 0))
    if projected != reader.get("hidden_size", 0):
        raise UnsupportedModelError(
            f"{reader.source}: word_embed_proj_dim = {projected} differs from hidden_size; "
            "projected embeddings (opt-350m) are not supported",
            param="word_embed_proj_dim",
        )


def _layer_windows(reader: _Reader, num_layers: int) -> tuple[int, ...]:
    """Window of each layer, from `layer_types` or the older keys that preceded it."""
    window = reader.get("sliding_window", 0)
    if not window or not reader.get("use_sliding_window", True):
        return (0,) * num_layers
    types = reader.get("layer_types", None)
    if types is not None:
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)
    pattern = reader.get("sliding_window_pattern", 0)
    if pattern:
        return tuple(window if (i + 1) % pattern else 0 for i in range(num_layers))
    first = reader.get("max_window_layers", 0)
    return tuple(window if i >= first else 0 for i in range(num_layers))


def _ropes(reader: _Reader, family: Family, head_dim: int) -> tuple[RopeConfig, ...]:
    """The rotations in use: (), (main,) or, with local layers of their own, (main, local)."""
    if family.position_offset is not None:
        return ()
    values, source = reader.values, reader.source
    nested = reader.get("rope_parameters", {})
    if "full_attention" in nested or reader.get("rope_local_base_freq", 0):
        old = {"rope_type": "default", "rope_theta": reader.get("rope_local_base_freq", 10_000.0)}
        local = nested.get("sliding_attention") or old
        main = {**values, "rope_parameters": nested.get("full_attention")}
        second = {"rope_parameters": local, "max_position_embeddings": main.get(_MAX_POSITIONS)}
        return parse_rope(main, head_dim, source), parse_rope(second, head_dim, source)
    return (parse_rope(values, head_dim, source),)


def _layer_ropes(reader: _Reader, windows: tuple[int, ...], num_ropes: int) -> tuple[int, ...]:
    if num_ropes == 0:
        return (-1,) * len(windows)
    if num_ropes == 2:
        return tuple(1 if window else 0 for window in windows)
    interval = reader.get("no_rope_layer_interval", 0)
    rotated = reader.get("no_rope_layers", None) or [
        not interval or (i + 1) % interval for i in range(len(windows))
    ]
    return tuple(0 if flag else -1 for flag in rotated[: len(windows)])
