"""The families: one row of facts each. A new model of a known shape is one more row here.

A row says how checkpoints name their tensors (Hugging Face and GGUF) and which of the decoder's
few switches are on. Sizes come from the checkpoint's own config; `hf_defaults` holds only the
values that a config.json may leave out. The road not taken: a module per family, as elsewhere;
the families differ by flags, and a flag is read in a second.

Name tables map our module name to the checkpoint's; several names are stacked on dim 0 in the
order given ([q; k; v] and [gate; up]). `{i}` is the layer. Suffixes (.weight, .bias) are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sterna.core.errors import UnsupportedModelError
from sterna.core.lookup import unknown

Names = Mapping[str, tuple[str, ...]]

_HF_LAYER = "model.layers.{i}."
_QKV = "layers.{i}.attn.qkv"
_GATE_UP = "layers.{i}.mlp.gate_up"

HF_LLAMA: Names = {
    "embed_tokens": ("model.embed_tokens",),
    "layers.{i}.attn_norm": (_HF_LAYER + "input_layernorm",),
    _QKV: tuple(_HF_LAYER + f"self_attn.{part}_proj" for part in "qkv"),
    "layers.{i}.attn.q_norm": (_HF_LAYER + "self_attn.q_norm",),
    "layers.{i}.attn.k_norm": (_HF_LAYER + "self_attn.k_norm",),
    "layers.{i}.attn.out": (_HF_LAYER + "self_attn.o_proj",),
    "layers.{i}.mlp_norm": (_HF_LAYER + "post_attention_layernorm",),
    _GATE_UP: (_HF_LAYER + "mlp.gate_proj", _HF_LAYER + "mlp.up_proj"),
    "layers.{i}.mlp.down": (_HF_LAYER + "mlp.down_proj",),
    "norm": ("model.norm",),
    "lm_head": ("lm_head",),
}
HF_PHI3: Names = {
    **HF_LLAMA,
    _QKV: (_HF_LAYER + "self_attn.qkv_proj",),
    _GATE_UP: (_HF_LAYER + "mlp.gate_up_proj",),
}
HF_GEMMA3: Names = {
    **HF_LLAMA,
    "layers.{i}.post_attn_norm": (_HF_LAYER + "post_attention_layernorm",),
    "layers.{i}.mlp_norm": (_HF_LAYER + "pre_feedforward_layernorm",),
    "layers.{i}.post_mlp_norm": (_HF_LAYER + "post_feedforward_layernorm",),
}
_OPT_LAYER = "model.decoder.layers.{i}."
HF_OPT: Names = {
    "embed_tokens": ("model.decoder.embed_tokens",),
    "embed_positions": ("model.decoder.embed_positions",),
    "layers.{i}.attn_norm": (_OPT_LAYER + "self_attn_layer_norm",),
    _QKV: tuple(_OPT_LAYER + f"self_attn.{part}_proj" for part in "qkv"),
    "layers.{i}.attn.out": (_OPT_LAYER + "self_attn.out_proj",),
    "layers.{i}.mlp_norm": (_OPT_LAYER + "final_layer_norm",),
    "layers.{i}.mlp.up": (_OPT_LAYER + "fc1",),
    "layers.{i}.mlp.down": (_OPT_LAYER + "fc2",),
    "norm": ("model.decoder.final_layer_norm",),
    "lm_head": ("lm_head",),
}
GGUF_LLAMA: Names = {
    "embed_tokens": ("token_embd",),
    "layers.{i}.attn_norm": ("blk.{i}.attn_norm",),
    _QKV: tuple(f"blk.{{i}}.attn_{part}" for part in "qkv"),
    "layers.{i}.attn.q_norm": ("blk.{i}.attn_q_norm",),
    "layers.{i}.attn.k_norm": ("blk.{i}.attn_k_norm",),
    "layers.{i}.attn.out": ("blk.{i}.attn_output",),
    "layers.{i}.mlp_norm": ("blk.{i}.ffn_norm",),
    _GATE_UP: ("blk.{i}.ffn_gate", "blk.{i}.ffn_up"),
    "layers.{i}.mlp.down": ("blk.{i}.ffn_down",),
    "norm": ("output_norm",),
    "lm_head": ("output",),
}
GGUF_PHI3: Names = {
    **GGUF_LLAMA,
    _QKV: ("blk.{i}.attn_qkv",),
    _GATE_UP: ("blk.{i}.ffn_up",),
}
GGUF_GEMMA3: Names = {
    **GGUF_LLAMA,
    "layers.{i}.post_attn_norm": ("blk.{i}.post_attention_norm",),
    "layers.{i}.post_mlp_norm": ("blk.{i}.post_ffw_norm",),
}


@dataclass(frozen=True, slots=True)
class Family:
    """The switches of one family. Everything else follows from the checkpoint's config.

    `gguf_permutes_qk`: the GGUF converter reorders Q and K rows for interleaved rotation.
    `gguf_adds_one`: it stores norm weights with the unit offset already added.
    `position_offset`: learned positions, whose table starts this many rows late; None = RoPE.
    """

    name: str
    architecture: str
    model_type: str
    hf_names: Names = field(default_factory=lambda: HF_LLAMA)
    gguf_arch: str | None = None
    gguf_names: Names = field(default_factory=lambda: GGUF_LLAMA)
    gguf_permutes_qk: bool = False
    gguf_adds_one: bool = False
    norm: Literal["rms", "layer"] = "rms"
    has_unit_offset: bool = False
    has_post_norms: bool = False
    has_qk_norm: bool = False
    has_qkv_bias: bool = False
    has_gated_mlp: bool = True
    has_scaled_embeddings: bool = False
    position_offset: int | None = None
    hf_defaults: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: tuple[Family, ...] = (
    Family("llama", "LlamaForCausalLM", "llama", gguf_arch="llama", gguf_permutes_qk=True),
    Family(
        "mistral",
        "MistralForCausalLM",
        "mistral",
        hf_defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        "qwen2",
        gguf_arch="qwen2",
        has_qkv_bias=True,
        hf_defaults={"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        "qwen3",
        gguf_arch="qwen3",
        has_qk_norm=True,
        hf_defaults={
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "head_dim": 128,
        },
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        "phi3",
        hf_names=HF_PHI3,
        gguf_arch="phi3",
        gguf_names=GGUF_PHI3,
        hf_defaults={"rms_norm_eps": 1e-5},
    ),
    Family(
        "gemma3",
        "Gemma3ForCausalLM",
        "gemma3_text",
        hf_names=HF_GEMMA3,
        gguf_arch="gemma3",
        gguf_names=GGUF_GEMMA3,
        gguf_adds_one=True,
        has_unit_offset=True,
        has_post_norms=True,
        has_qk_norm=True,
        has_scaled_embeddings=True,
        hf_defaults={
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        "smollm3",
        gguf_arch="smollm3",
        gguf_permutes_qk=True,
        hf_defaults={
            "rope_theta": 2_000_000.0,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
        },
    ),
    Family(
        "opt",
        "OPTForCausalLM",
        "opt",
        hf_names=HF_OPT,
        norm="layer",
        has_qkv_bias=True,
        has_gated_mlp=False,
        position_offset=2,
        hf_defaults={
            "max_position_embeddings": 2048,
            "hidden_act": "relu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 2,
        },
    ),
)


def family_of_architecture(architecture: str, source: str) -> Family:
    """The family of a Hugging Face architecture name; `source` is named in the error.

    Raises UnsupportedModelError with the known names and the nearest one.
    """
    by_name = {family.architecture: family for family in FAMILIES}
    if architecture not in by_name:
        raise UnsupportedModelError(f"{source}: {unknown('architecture', architecture, by_name)}")
    return by_name[architecture]


def family_of_gguf_arch(arch: str, source: str) -> Family:
    """The family of a GGUF `general.architecture`; errors as `family_of_architecture`."""
    by_arch = {family.gguf_arch: family for family in FAMILIES if family.gguf_arch}
    if arch not in by_arch:
        raise UnsupportedModelError(f"{source}: {unknown('GGUF architecture', arch, by_arch)}")
    return by_arch[arch]
