"""The encoder families: one row of facts each, as `families.py` has for decoders.

Two shapes of layer exist. `post`: h = norm(out(attention(h)) + h), then the same around the MLP
(BERT, RoBERTa, GTE, Nomic). `pre`: each branch reads normed input and is added to the stream, with
a last norm after all layers (ModernBERT). What else differs is a flag or a name.

Name tables map our module name to the checkpoint's, as in `families.py`; a family whose
checkpoints exist under several names lists them all, and the first that fits is taken. `prefixes`
are what stands before every name of the base model, by kind of checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sterna.core.errors import UnsupportedModelError
from sterna.core.lookup import unknown
from sterna.model.families import Names

HeadKind = Literal["none", "pooler", "dense", "prediction"]


def _names(
    embed: str, embed_norm: str, layer: str, parts: Mapping[str, tuple[str, ...]], **more: str
) -> Names:
    layers = {f"layers.{{i}}.{own}": tuple(layer + p for p in ps) for own, ps in parts.items()}
    extra = {own: (name,) for own, name in more.items()}
    return {"embed.word": (embed,), "embed.norm": (embed_norm,), **layers, **extra}


_BERT_PARTS = {
    "qkv": tuple(f"attention.self.{part}" for part in ("query", "key", "value")),
    "out": ("attention.output.dense",),
    "attn_norm": ("attention.output.LayerNorm",),
    "up": ("intermediate.dense",),
    "down": ("output.dense",),
    "mlp_norm": ("output.LayerNorm",),
}
_BERT = _names(
    "embeddings.word_embeddings", "embeddings.LayerNorm", "encoder.layer.{i}.", _BERT_PARTS,
    positions="embeddings.position_embeddings", types="embeddings.token_type_embeddings",
)  # fmt: skip
_SPLIT_PARTS = {
    "qkv": tuple(f"self_attn.{part}_proj" for part in "qkv"),
    "out": ("self_attn.o_proj",),
    "attn_norm": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "mlp_norm": ("post_mlp_layernorm",),
}
_SPLIT = _names(
    "embeddings.word_embeddings", "embeddings.LayerNorm", "layers.{i}.", _SPLIT_PARTS,
    types="embeddings.token_type_embeddings",
)  # fmt: skip
_GTE_STACKED = _names(
    "embeddings.word_embeddings", "embeddings.LayerNorm", "encoder.layer.{i}.",
    {
        "qkv": ("attention.qkv_proj",), "out": ("attention.o_proj",), "attn_norm": ("attn_ln",),
        "up_gate": ("mlp.up_gate_proj",), "down": ("mlp.down_proj",), "mlp_norm": ("mlp_ln",),
    },
    types="embeddings.token_type_embeddings",
)  # fmt: skip
_NOMIC_STACKED = _names(
    "embeddings.word_embeddings", "emb_ln", "encoder.layers.{i}.",
    {
        "qkv": ("attn.Wqkv",), "out": ("attn.out_proj",), "attn_norm": ("norm1",),
        "gate_up": ("mlp.fc12", "mlp.fc11"), "down": ("mlp.fc2",), "mlp_norm": ("norm2",),
    },
    types="embeddings.token_type_embeddings",
)  # fmt: skip
_MODERNBERT = _names(
    "embeddings.tok_embeddings", "embeddings.norm", "layers.{i}.",
    {
        "qkv": ("attn.Wqkv",), "out": ("attn.Wo",), "attn_norm": ("attn_norm",),
        "gate_up": ("mlp.Wi",), "down": ("mlp.Wo",), "mlp_norm": ("mlp_norm",),
    },
    norm="final_norm",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    """The switches of one family; sizes come from the checkpoint's config.

    `head`: what stands before the classifier. "pooler": the base model's dense + tanh of the first
    token; "dense": the classifier's own; "prediction": dense, activation and norm (ModernBERT).
    `defaults`: values that a config.json may leave out.
    """

    name: str
    architectures: tuple[str, ...]  # the base model's and those with a head that is not used
    classifier: str  # the architecture with a classification head
    prefixes: tuple[str, ...]
    names: tuple[Names, ...]
    head: HeadKind = "pooler"
    is_pre_norm: bool = False
    is_gated: bool = False
    has_learned_positions: bool = False
    starts_after_padding: bool = False  # learned positions begin at pad_token_id + 1
    has_qkv_bias: bool = True
    has_down_bias: bool = True
    has_norm_bias: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)


_ROBERTA: dict[str, Any] = {
    "prefixes": ("", "roberta."),
    "names": (_BERT,),
    "head": "dense",
    "has_learned_positions": True,
    "starts_after_padding": True,
    "defaults": {"layer_norm_eps": 1e-12, "pad_token_id": 1, "type_vocab_size": 2},
}

ENCODER_FAMILIES: tuple[EncoderFamily, ...] = (
    EncoderFamily(
        "bert",
        ("BertModel", "BertForMaskedLM", "BertForPreTraining"),
        "BertForSequenceClassification",
        ("", "bert."),
        (_BERT,),
        has_learned_positions=True,
        defaults={"layer_norm_eps": 1e-12, "pad_token_id": 0, "type_vocab_size": 2},
    ),
    EncoderFamily(
        "roberta",
        ("RobertaModel", "RobertaForMaskedLM"),
        "RobertaForSequenceClassification",
        **_ROBERTA,
    ),
    EncoderFamily(
        "xlm-roberta",
        ("XLMRobertaModel", "XLMRobertaForMaskedLM"),
        "XLMRobertaForSequenceClassification",
        **_ROBERTA,
    ),
    EncoderFamily(
        "gte",
        ("GteModel", "GteForMaskedLM", "NewModel", "NewForMaskedLM"),
        "GteForSequenceClassification",
        ("", "gte.", "new."),
        (_SPLIT, _GTE_STACKED),
        is_gated=True,
        defaults={"layer_norm_eps": 1e-12, "type_vocab_size": 1, "rope_theta": 160_000.0},
    ),
    EncoderFamily(
        "nomic-bert",
        ("NomicBertModel", "NomicBertForMaskedLM"),
        "NomicBertForSequenceClassification",
        ("", "nomic_bert."),
        (_SPLIT, _NOMIC_STACKED),
        is_gated=True,
        has_qkv_bias=False,
        has_down_bias=False,
        defaults={
            "layer_norm_eps": 1e-12, "type_vocab_size": 2, "rope_theta": 1000.0,
            "hidden_act": "silu", "max_position_embeddings": 2048,
        },
    ),
    EncoderFamily(
        "modernbert",
        ("ModernBertModel", "ModernBertForMaskedLM"),
        "ModernBertForSequenceClassification",
        ("", "model."),
        (_MODERNBERT,),
        head="prediction",
        is_pre_norm=True,
        is_gated=True,
        has_qkv_bias=False,
        has_down_bias=False,
        has_norm_bias=False,
        defaults={
            "layer_norm_eps": 1e-5, "type_vocab_size": 0, "hidden_act": "gelu",
            "max_position_embeddings": 8192, "local_attention": 128,
            "global_attn_every_n_layers": 3,
        },
    ),
)  # fmt: skip


def encoder_family(architecture: str, source: str) -> EncoderFamily:
    """The family of an architecture name; UnsupportedModelError, naming `source`, when unknown."""
    by_name = encoder_architectures()
    if architecture not in by_name:
        raise UnsupportedModelError(f"{source}: {unknown('architecture', architecture, by_name)}")
    return by_name[architecture]


def encoder_architectures() -> dict[str, EncoderFamily]:
    """Every architecture that an encoder checkpoint may name."""
    return {
        name: family
        for family in ENCODER_FAMILIES
        for name in (*family.architectures, family.classifier)
    }
