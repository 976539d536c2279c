"""Checkpoint tensors <-> module parameters, for both name worlds.

A `TensorSource` yields checkpoint tensors by name; `assign` walks the decoder's parameters,
looks up their names in the family's table, stacks parts and puts them in place without a copy
where there is one part of the right dtype. `export` walks the other way for saving.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from sterna.core.errors import ModelFileError
from sterna.model.config import ModelConfig
from sterna.model.decoder import Decoder
from sterna.model.families import Names


class TensorSource(Protocol):
    """Where checkpoint tensors come from."""

    label: str  # the file or folder, for errors

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor in `dtype`, on the CPU. Raises ModelFileError when it is missing."""
        ...


def assign(decoder: Decoder, source: TensorSource, names: Names, device: torch.device) -> None:
    """Fill every parameter of `decoder` (made on "meta") from `source`, on `device`.

    Raises ModelFileError naming the file for a missing tensor or a wrong shape.
    """
    for own_name, parameter in list(decoder.named_parameters()):
        value = read_parameter(source, own_name, names, parameter.shape, parameter.dtype)
        _replace(decoder, own_name, value.to(device))


def read_parameter(
    source: TensorSource, own_name: str, names: Names, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """One parameter's value, its parts stacked. ModelFileError for a missing or misshapen one."""
    parts = [source.read(name, dtype) for name in checkpoint_names(own_name, names)]
    value = parts[0] if len(parts) == 1 else torch.cat(parts)
    if value.shape != shape:
        raise ModelFileError(
            f"{source.label}: {checkpoint_names(own_name, names)[0]} has shape "
            f"{tuple(value.shape)}, the config asks for {tuple(shape)}"
        )
    return value


def export(decoder: Decoder, names: Names) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint name and contiguous tensor of every parameter; stacked ones are split.

    Needs plain weights, that is a decoder before `prepare_inference`.
    """
    for own_name, parameter in decoder.named_parameters():
        yield from split_parts(own_name, parameter.detach(), names, decoder.config)


def split_parts(
    own_name: str, value: Tensor, names: Names, config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint names and contiguous parts of one parameter's value."""
    targets = checkpoint_names(own_name, names)
    sizes = _part_sizes(own_name, len(targets), value.shape[0], config)
    for target, part in zip(targets, torch.split(value, sizes), strict=True):
        yield target, part.contiguous()


def checkpoint_names(own_name: str, names: Names) -> tuple[str, ...]:
    """`layers.3.attn.qkv.weight` -> the checkpoint's names, in stacking order."""
    module, _, suffix = own_name.rpartition(".")
    pieces = module.split(".")
    layer = pieces[1] if pieces[0] == "layers" else ""
    if layer:
        pieces[1] = "{i}"
    patterns = names[".".join(pieces)]
    return tuple(f"{pattern.replace('{i}', layer)}.{suffix}" for pattern in patterns)


def _part_sizes(own_name: str, num_parts: int, rows: int, config: ModelConfig) -> list[int]:
    if not own_name.startswith("layers.") or num_parts < 3:
        return [rows // num_parts] * num_parts
    kv_rows = config.num_key_value_heads * config.head_dim
    assert num_parts == 3, own_name
    return [rows - 2 * kv_rows, kv_rows, kv_rows]


def _replace(decoder: nn.Module, name: str, value: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(decoder.get_submodule(module), leaf, nn.Parameter(value))
