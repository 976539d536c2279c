"""EncoderConfig: what an encoder is built from, read from a Hugging Face config.json. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sterna.core.errors import ModelFileError, UnsupportedModelError
from sterna.core.lookup import unknown
from sterna.model.config import ACTIVATIONS
from sterna.model.encoder_families import EncoderFamily, encoder_architectures, encoder_family
from sterna.model.rope_config import RopeConfig, parse_rope

GATED = ("gelu", "gelu_tanh", "silu")
_RENAMED = {"hidden_activation": "hidden_act", "norm_eps": "layer_norm_eps"}
_SIGMOID, _IDENTITY = "Sigmoid", "Identity"


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Sizes and options of one encoder.

    `num_positions`: the longest sequence. `layer_windows[i]`: keys a token of layer i sees on
    either side, 0 = all. `layer_ropes[i]`: index into `ropes`, -1 = no rotation. `num_labels` 0 =
    no classification head.
    """

    family: EncoderFamily
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    num_positions: int
    position_offset: int
    type_vocab_size: int
    norm_eps: float
    hidden_act: str
    has_qkv_bias: bool
    has_out_bias: bool
    has_mlp_bias: bool
    has_norm_bias: bool
    ropes: tuple[RopeConfig, ...]
    layer_ropes: tuple[int, ...]
    layer_windows: tuple[int, ...]
    num_labels: int
    classifier_pooling: str
    has_sigmoid: bool
    hf: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def attention_scale(self) -> float:
        """Factor on the scores."""
        return float(self.head_dim**-0.5)


def is_encoder(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an encoder of the table."""
    return _architecture(hf) in encoder_architectures()


def parse_encoder_config(hf: Mapping[str, Any], source: str) -> EncoderConfig:
    """The EncoderConfig of a config.json dictionary; `source` is named in errors.

    Raises UnsupportedModelError for an unknown architecture or option, ModelFileError for a
    missing or impossible value.
    """
    name = _architecture(hf)
    family = encoder_family(name, source)
    renamed = {new: hf[old] for old, new in _RENAMED.items() if hf.get(old) is not None}
    values = {**family.defaults, **{k: v for k, v in hf.items() if v is not None}, **renamed}
    _refuse_unsupported(values, family, source)
    return _build(values, family, source, hf, name == family.classifier)


def _architecture(hf: Mapping[str, Any]) -> str:
    return str(next(iter(hf.get("architectures") or ()), ""))


def _build(
    values: Mapping[str, Any],
    family: EncoderFamily,
    source: str,
    hf: Mapping[str, Any],
    has_head: bool,
) -> EncoderConfig:
    num_layers, heads = _size(values, "num_hidden_layers", source), _heads(values, source)
    hidden = _size(values, "hidden_size", source)
    offset = int(values["pad_token_id"]) + 1 if family.starts_after_padding else 0
    windows = _windows(values, family, num_layers)
    ropes = _ropes(values, family, hidden // heads, source)
    attention_bias = bool(values.get("attention_bias", family.has_qkv_bias))
    return EncoderConfig(
        family=family,
        vocab_size=_size(values, "vocab_size", source),
        hidden_size=hidden,
        intermediate_size=_size(values, "intermediate_size", source),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        head_dim=hidden // heads,
        num_positions=_size(values, "max_position_embeddings", source) - offset,
        position_offset=offset,
        type_vocab_size=int(values.get("type_vocab_size", 0)),
        norm_eps=float(values["layer_norm_eps"]),
        hidden_act=_activation(values, family, source),
        has_qkv_bias=attention_bias,
        has_out_bias=attention_bias,
        has_mlp_bias=bool(values.get("mlp_bias", family.has_down_bias)),
        has_norm_bias=bool(values.get("norm_bias", family.has_norm_bias)),
        ropes=ropes,
        layer_ropes=_layer_ropes(windows, len(ropes)),
        layer_windows=windows,
        num_labels=_num_labels(values) if has_head else 0,
        classifier_pooling=str(values.get("classifier_pooling", "cls")),
        has_sigmoid=_has_sigmoid(values, source),
        hf=hf,
    )


def _size(values: Mapping[str, Any], key: str, source: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelFileError(
            f"{source}: {key} is {value!r}; a positive whole number is needed", param=key
        )
    return value


def _heads(values: Mapping[str, Any], source: str) -> int:
    heads, hidden = (_size(values, k, source) for k in ("num_attention_heads", "hidden_size"))
    if hidden % heads:
        raise ModelFileError(
            f"{source}: hidden_size {hidden} is no multiple of {heads} attention heads"
        )
    return heads


def _activation(values: Mapping[str, Any], family: EncoderFamily, source: str) -> str:
    name = values.get("hidden_act", "gelu")
    kind = ACTIVATIONS.get(name)
    if kind is None or (family.is_gated and kind not in GATED):
        known = [n for n, k in ACTIVATIONS.items() if not family.is_gated or k in GATED]
        raise UnsupportedModelError(f"{source}: {unknown('activation', str(name), known)}")
    return kind


_OPTIONS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("position_embedding_type", ("absolute", "rope")),
    ("is_decoder", (False,)),
    ("add_cross_attention", (False,)),
    ("layer_norm_type", ("layer_norm",)),
    ("logn_attention_scale", (False,)),
    ("rotary_emb_interleaved", (False,)),
    ("rotary_emb_fraction", (1.0,)),
    ("prenorm", (False,)),
    ("use_rms_norm", (False,)),
    ("parallel_block", (False,)),
)


def _refuse_unsupported(values: Mapping[str, Any], family: EncoderFamily, source: str) -> None:
    for key, allowed in _OPTIONS:
        if values.get(key, allowed[0]) not in allowed:
            raise UnsupportedModelError(
                f"{source}: {key} = {values[key]!r} is not supported for family {family.name}, "
                f"only {' or '.join(map(repr, allowed))}",
                param=key,
            )


def _windows(values: Mapping[str, Any], family: EncoderFamily, num_layers: int) -> tuple[int, ...]:
    """ModernBERT: every n-th layer sees all, the others half of `local_attention` either way."""
    if not family.is_pre_norm:
        return (0,) * num_layers
    half, every = values["local_attention"] // 2, values["global_attn_every_n_layers"]
    kinds = values.get("layer_types") or [
        "sliding_attention" if i % every else "full_attention" for i in range(num_layers)
    ]
    return tuple(half if kind == "sliding_attention" else 0 for kind in kinds)


def _ropes(
    values: Mapping[str, Any], family: EncoderFamily, head_dim: int, source: str
) -> tuple[RopeConfig, ...]:
    """(), one rotation, or those of full and of local layers."""
    if family.has_learned_positions:
        return ()
    length = {"max_position_embeddings": values["max_position_embeddings"]}
    if not family.is_pre_norm:
        return (parse_rope(values, head_dim, source),)
    nested = values.get("rope_parameters") or {}
    full = nested.get("full_attention") or {
        "rope_theta": values.get("global_rope_theta", 160_000.0)
    }
    local = nested.get("sliding_attention") or {
        "rope_theta": values.get("local_rope_theta", 10_000.0)
    }
    both = (
        parse_rope({**length, "rope_parameters": part}, head_dim, source) for part in (full, local)
    )
    return tuple(both)


def _layer_ropes(windows: tuple[int, ...], num_ropes: int) -> tuple[int, ...]:
    if num_ropes == 2:
        return tuple(1 if window else 0 for window in windows)
    return (num_ropes - 1,) * len(windows)


def _num_labels(values: Mapping[str, Any]) -> int:
    labels = values.get("id2label")
    return len(labels) if labels else int(values.get("num_labels", 2))


def _has_sigmoid(values: Mapping[str, Any], source: str) -> bool:
    """What a cross encoder's score goes through, in the words of sentence-transformers."""
    nested = values.get("sentence_transformers") or {}
    name = nested.get("activation_fn") or values.get("sbert_ce_default_activation_function")
    if name is None:
        return _num_labels(values) == 1
    kind = str(name).rpartition(".")[2]
    if kind not in (_SIGMOID, _IDENTITY):
        raise UnsupportedModelError(
            f"{source}: the score's activation is {name!r}; supported: {_SIGMOID}, {_IDENTITY}"
        )
    return kind == _SIGMOID
