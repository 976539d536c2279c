"""The model of a trial: random by a config, or a checkpoint cut to a size that can be compared."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from sterna.core.errors import UnsupportedModelError
from sterna.model.config import parse_config
from sterna.model.decoder import Decoder
from sterna.model.hf import HFDecoder
from sterna.model.load import load_model


@dataclasses.dataclass(frozen=True, slots=True)
class TrialModel:
    """Which model a trial runs. Of `path`, the first layers and tokens are kept."""

    config: dict[str, Any] | None = None  # a config.json, weights by seed
    path: str = ""
    backend: str = "native"  # or "hf"
    num_layers: int | None = None
    vocab_size: int | None = None


def make_model(wanted: TrialModel, dtype: torch.dtype, seed: int) -> Any:
    """The model in `dtype`, the same on every rank. Errors as `load_model` and `load_hf`."""
    if wanted.backend == "hf":
        model: Any = _hf_model(wanted, dtype, seed)
    elif wanted.path:
        model = _cut(load_model(wanted.path, "float32").decoder, wanted).to(dtype)
        model.dtype = dtype
    else:
        assert wanted.config is not None
        model = Decoder(parse_config(wanted.config, "trial"), dtype)
        initialise(model, seed)
    return model


def initialise(model: nn.Module, seed: int) -> None:
    """Random weights, wide enough that an error shows; one-dimensional ones are near 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
        parameter.data.copy_(noise + 1.0 if parameter.dim() == 1 else noise)


def _cut(decoder: Decoder, wanted: TrialModel) -> Decoder:
    """The first layers and the first rows of the vocabulary."""
    config = decoder.config
    if config.swiftkv is not None:
        raise UnsupportedModelError("a SwiftKV model cannot be verified; verify the original")
    layers = wanted.num_layers or config.num_hidden_layers
    vocab = min(wanted.vocab_size or config.vocab_size, config.vocab_size)
    if any(p.dim() > 2 or not p.is_floating_point() for p in decoder.parameters()):
        raise UnsupportedModelError(
            "quantised weights cannot be verified in full precision; verify the plain model"
        )
    decoder.layers = decoder.layers[:layers]
    decoder.config = dataclasses.replace(config, vocab_size=vocab, num_hidden_layers=layers)
    for module in (decoder.embed_tokens, decoder.lm_head):
        if module is not None:
            module.weight = nn.Parameter(module.weight.detach()[:vocab].clone())
    decoder.embed_tokens.num_rows = vocab
    if decoder.lm_head is not None:
        decoder.lm_head.vocab_size = vocab
    return decoder


def _hf_model(wanted: TrialModel, dtype: torch.dtype, seed: int) -> HFDecoder:
    from transformers import AutoConfig, AutoModelForCausalLM

    if wanted.config is not None:
        config = AutoConfig.for_model(**wanted.config)
        decoder = HFDecoder(AutoModelForCausalLM.from_config(config).to(dtype))
        initialise(decoder, seed)
        return decoder
    config = AutoConfig.from_pretrained(wanted.path, local_files_only=True)
    layers = wanted.num_layers or config.num_hidden_layers
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    model = AutoModelForCausalLM.from_pretrained(
        wanted.path, config=config, dtype=dtype, local_files_only=True, trust_remote_code=False
    )
    if wanted.vocab_size is not None and wanted.vocab_size < config.vocab_size:
        model.resize_token_embeddings(wanted.vocab_size)
    return HFDecoder(model)
