"""Which parts of a decoder's weights can have a low-rank adapter, and what adapters are added to.

A stacked weight (qkv, gate_up) is adapted part by part, under the names that Hugging Face
checkpoints, and so PEFT's files, give the parts. Training (train/adapter.py) and serving
(engine/adapters.py) wrap the same modules.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sterna.kernels import ops
from sterna.kernels.quant_weight import FlatWeight
from sterna.kernels.tiles import TILE_ROWS
from sterna.model.decoder import Decoder
from sterna.model.layers import GatedLinear, Linear
from sterna.model.weights import split_parts
from sterna.quant.linear import QuantGatedLinear, QuantLinear

ADAPTABLE = (Linear, GatedLinear, QuantLinear, QuantGatedLinear)
GATED = (GatedLinear, QuantGatedLinear)


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [start, stop) of a stacked weight that checkpoints call `name` (a full module name)."""

    name: str
    start: int
    stop: int

    @property
    def leaf(self) -> str:
        """The last word of the name, such as q_proj."""
        return self.name.rpartition(".")[2]

    @property
    def size(self) -> int:
        """Rows."""
        return self.stop - self.start


class Wrapper(nn.Module):
    """In place of a projection, with adapters beside it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base: Any = base


def native_spans(decoder: Decoder) -> Iterator[tuple[str, tuple[Span, ...]]]:
    """(module, its parts) of every projection of the blocks, wrapped already or not."""
    names = decoder.config.hf_names
    for name, module in decoder.named_modules():
        base = module.base if isinstance(module, Wrapper) else module
        if ".base" in name or not isinstance(base, ADAPTABLE):
            continue
        rows = torch.empty(base.out_features * (1 + isinstance(base, GATED)), 1, device="meta")
        start, spans = 0, []
        for full, part in split_parts(f"{name}.weight", rows, names, decoder.config):
            spans.append(Span(full.removesuffix(".weight"), start, start + len(part)))
            start += len(part)
        yield name, tuple(spans)


def twin(decoder: Decoder) -> Decoder:
    """The same decoder without what wraps its projections, sharing every module that has weights.

    Modules above those are copies, so that the twin can be wrapped, or lose its head, by itself.
    """
    found = _unwrapped(decoder)
    assert isinstance(found, Decoder)
    return found


def _unwrapped(module: nn.Module) -> nn.Module:
    if isinstance(module, Wrapper):
        base: nn.Module = module.base
        return base
    if not module._modules:
        return module
    found = copy.copy(module)
    found._parameters = dict(module._parameters)
    found._modules = {
        name: None if child is None else _unwrapped(child)
        for name, child in module._modules.items()
    }
    return found


def wide_product(base: Any, x: Tensor) -> Tensor:
    """x W^T in float32, unrounded: the `logits` op on any weight, with the padding it may have.

    [T, N]; of a gated weight [T, W], the gate from 0 and up from W / 2: each half is padded to
    whole panels or row blocks.
    """
    if isinstance(base, Linear | GatedLinear):
        weight = base.weight
        panels = 1 if weight.dim() == 2 else weight.shape[2]
        rows = base.out_features if isinstance(base, Linear) else weight.shape[0] * panels
        return ops.logits(x, weight, rows)
    flat: FlatWeight = base.quant_weight.flat()
    is_gated = isinstance(base, QuantGatedLinear)
    rows = flat[0].shape[0] * TILE_ROWS if is_gated else base.out_features
    int8: bool = base.int8_activations
    return ops.quant_logits(x, *flat, rows, int8_activations=int8)
