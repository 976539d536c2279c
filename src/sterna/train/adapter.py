"""Low-rank adapters on a decoder: put on, find, take off, merge.

The native decoder's stacked weights are adapted part by part under the names that Hugging Face
checkpoints (and so PEFT's files) give them; models behind transformers module by module. The base
is frozen, plain or quantised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from sterna.core.errors import ConfigError
from sterna.core.lookup import unknown
from sterna.model.decoder import Decoder
from sterna.model.hf import HFDecoder
from sterna.quant.adapted import ADAPTABLE, GATED, Span, native_spans
from sterna.quant.foreign import dequantize_foreign
from sterna.quant.linear import dequantize_decoder, quant_modules
from sterna.train.adapter_config import ALL_LINEAR, AdapterConfig
from sterna.train.adapter_foreign import AdaptedForeign, is_linear, weight_of
from sterna.train.adapter_modules import (
    AdaptedGated,
    AdaptedLinear,
    AdaptedModule,
    AdapterPart,
)

# What adapters are put on.
AnyDecoder = Decoder | HFDecoder
_REFUSED = MappingProxyType(
    {
        "lm_head": "the losses read the head as one matrix, and a tied one is the embedding too",
        "embed_tokens": "an embedding is a table look-up, with nothing to multiply",
    }
)


@dataclass(frozen=True, slots=True)
class Target:
    """A part of a module that can be adapted: our module's name, the part and its siblings."""

    module: str
    span: Span
    spans: tuple[Span, ...]


def adaptable(decoder: AnyDecoder) -> Iterator[Target]:
    """Every part of every projection in the blocks, adapted already or not."""
    if isinstance(decoder, HFDecoder):
        yield from _foreign_targets(decoder)
        return
    for name, spans in native_spans(decoder):
        yield from (Target(name, span, spans) for span in spans)


def _foreign_targets(decoder: HFDecoder) -> Iterator[Target]:
    """The linear modules inside the blocks, under the names transformers gives them."""
    inside = {module for layer in decoder.layers for module in layer.modules()}
    for name, module in decoder.model.named_modules():
        base = module.base if isinstance(module, AdaptedModule) else module
        if module in inside and not name.endswith(".base") and is_linear(base):
            span = Span(name, 0, weight_of(base).shape[0])
            yield Target(f"model.{name}", span, (span,))


def add_adapter(decoder: AnyDecoder, config: AdapterConfig, seed: int = 0) -> None:
    """Freeze `decoder` and put fresh adapters on the parts that `config` names.

    Raises ConfigError for an unknown or refused part, a layer out of range, or a second adapter.
    """
    chosen = _chosen(decoder, config)
    generator = torch.Generator().manual_seed(seed)
    for target in chosen:
        part = place_part(decoder, target, config, config.rank, config.alpha)
        part.init_a(generator)
    finish_adapter(decoder, config)


def place_part(
    decoder: AnyDecoder, target: Target, config: AdapterConfig, rank: int, alpha: float
) -> AdapterPart:
    """An adapter with B = 0 on one part, whose module is wrapped at its first one."""
    wrapper = decoder.get_submodule(target.module)
    if not isinstance(wrapper, AdaptedModule):
        wrapper = _wrapper_of(wrapper)(wrapper, target.spans, config.kind == "dora")
        _replace(decoder, target.module, wrapper)
    in_features = wrapper.rows(target.span).shape[1]
    scaling = config.scaling(rank, alpha)
    part = AdapterPart(target.span, rank, alpha, scaling, in_features, config.dropout)
    wrapper.add(part)
    return part


def _wrapper_of(base: nn.Module) -> type[AdaptedModule]:
    if isinstance(base, GATED):
        return AdaptedGated
    return AdaptedLinear if isinstance(base, ADAPTABLE) else AdaptedForeign


def finish_adapter(decoder: AnyDecoder, config: AdapterConfig) -> None:
    """Freeze the base, leave the adapters trainable, on the base's device."""
    decoder.requires_grad_(False)
    for _, module in adapted_modules(decoder):
        module.parts.to(decoder.device).requires_grad_(True)


def adapted_modules(decoder: nn.Module) -> Iterator[tuple[str, AdaptedModule]]:
    """(name, module) of every adapted module."""
    for name, module in decoder.named_modules():
        if isinstance(module, AdaptedModule):
            yield name, module


@contextmanager
def adapter_off(decoder: nn.Module) -> Iterator[None]:
    """The base alone, to the bit, while this lasts."""
    modules = [module for _, module in adapted_modules(decoder)]
    for module in modules:
        module.is_on = False
    try:
        yield
    finally:
        for module in modules:
            module.is_on = True


def trainable_parameters(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """The parameters that take gradients, by name: all of a plain model, A, B and m of an adapted
    one."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def merge_adapter(decoder: AnyDecoder) -> None:
    """Fold the adapters into plain weights, in place: s B A (and m) in float32, one rounding.

    Quantised weights, the unadapted ones too, become plain first: a merged weight has other codes.
    ConfigError when there is no adapter.
    """
    modules = list(adapted_modules(decoder))
    if not modules:
        raise ConfigError("this model has no adapter to merge; add or load one first")
    for name, module in modules:
        _replace(decoder, name, module.base)
    if isinstance(decoder, HFDecoder):
        dequantize_foreign(decoder)
    elif any(True for _ in quant_modules(decoder)):
        dequantize_decoder(decoder)
    for name, module in modules:
        _merge(decoder.get_submodule(name), module)


def _merge(plain: Any, module: AdaptedModule) -> None:
    weight = weight_of(plain)
    for part in module.adapters():
        rows = weight[part.span.start : part.span.stop]
        rows.copy_(part.merged(rows))


def _chosen(decoder: AnyDecoder, config: AdapterConfig) -> list[Target]:
    targets = list(adaptable(decoder))
    if any(True for _ in adapted_modules(decoder)):
        raise ConfigError("this model has an adapter already; merge it first")
    _check_layers(decoder, config)
    if ALL_LINEAR in config.targets:
        _refuse_experts(decoder)
    for word in config.targets:
        _check_word(word, targets)
    return [
        target
        for target in targets
        if any(_is_named(target.span, word) for word in config.targets)
        and (not config.layers or layer_of(target.module) in config.layers)
    ]


def _refuse_experts(decoder: AnyDecoder) -> None:
    """ConfigError where all-linear would leave out weights that are no linear modules."""
    names = decoder.named_parameters() if isinstance(decoder, HFDecoder) else ()
    stacked = next((name for name, p in names if p.dim() > 2), None)
    if stacked is not None:
        raise ConfigError(
            f"adapter target {ALL_LINEAR!r}: {stacked} holds all experts in one tensor, which no "
            "adapter is put on; name what is adapted, such as q_proj, v_proj",
            param="adapter.targets",
        )


def _check_word(word: str, targets: list[Target]) -> None:
    if word in _REFUSED:
        raise ConfigError(f"adapter target {word!r} is refused: {_REFUSED[word]}")
    if not any(_is_named(target.span, word) for target in targets):
        leaves = {target.span.leaf for target in targets}
        raise ConfigError(unknown("adapter target", word, {*leaves, ALL_LINEAR}))


def _is_named(span: Span, word: str) -> bool:
    """Whether a word of the settings means this part: its name, the end of it, or a pattern."""
    is_end = span.name == word or span.name.endswith(f".{word}")
    return word == ALL_LINEAR or is_end or fnmatchcase(span.name, word)


def _check_layers(decoder: AnyDecoder, config: AdapterConfig) -> None:
    count = decoder.config.num_hidden_layers
    wrong = [i for i in config.layers if not 0 <= i < count]
    if wrong:
        raise ConfigError(f"adapter layers {wrong}; the model has layers 0 to {count - 1}")


def layer_of(module_name: str) -> int:
    """3 of "layers.3.attn.qkv" and of "model.transformer.h.3.attn.c_attn"."""
    found = re.search(r"(?:^|\.)(\d+)\.", module_name)
    assert found is not None, module_name
    return int(found[1])


def _replace(decoder: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(decoder.get_submodule(parent), leaf, module)
