"""What every weight transport checks, and how it reads and writes a weight's bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sterna.core.errors import TransportError

Weights = Mapping[str, Tensor]
# (dtype, shape, checksum) by name
Manifest = dict[str, tuple[str, tuple[int, ...], int]]

MASK = (1 << 64) - 1
TORN = -1  # the version while a sender writes
_WORDS = 1 << 20
_PRIME = 0x9E3779B97F4A7C15
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def checksum(tensor: Tensor) -> int:
    """64 bits over a tensor's bytes: sum of words times odd numbers, so that one flipped bit or two
    words exchanged within 8 MiB show. The same on every device and for any number of threads."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    rest = data.numel() % 8
    if rest:
        data = torch.cat([data, data.new_zeros(8 - rest)])
    words = data.view(torch.int64)
    factors = 2 * torch.arange(min(_WORDS, len(words)), device=data.device) + 1
    found = tensor.numel() * tensor.element_size()
    for part in torch.split(words, _WORDS):
        found = (found * _PRIME + int((part * factors[: len(part)]).sum())) & MASK
    return found


def raw_bytes(tensor: Tensor) -> Tensor:
    """A weight's bytes, uint8: a view where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def put(tensor: Tensor, data: Tensor) -> None:
    """Bytes into a weight, which stays where it is: recorded steps keep its address."""
    held = tensor.detach()
    if held.is_contiguous():
        held.view(-1).view(torch.uint8).copy_(data)
    else:
        held.copy_(data.clone().view(held.dtype).view(held.shape))


def kind(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    """(dtype as safetensors names it, shape)."""
    return _DTYPES[tensor.dtype], tuple(tensor.shape)


def num_bytes(entry: tuple[str, tuple[int, ...], int]) -> int:
    """Of a weight in a manifest."""
    return int(np.prod(entry[1], dtype=np.int64)) * (4 if entry[0] == "F32" else 2)


def signed(value: int) -> int:
    """A checksum as an int64 holds it."""
    return value - (1 << 64) if value >> 63 else value


def check_version(found: int, wanted: int) -> None:
    """TransportError for another version."""
    if found != wanted:
        what = "is being written" if found == TORN else f"is {found}"
        raise TransportError(
            f"the version of the weights {what}, {wanted} was asked for; sender and receiver have "
            "lost each other. Continue the run from its newest checkpoint"
        )


def check_names(sent: Mapping[str, Any], weights: Weights) -> None:
    """TransportError for other weights."""
    if set(sent) != set(weights):
        odd = sorted(set(sent) ^ set(weights))
        raise TransportError(
            f"sender and receiver hold different weights: {', '.join(odd[:4])}"
            f"{', ...' if len(odd) > 4 else ''}; both sides need the same model"
        )


def check_kind(
    name: str, sent: tuple[str, tuple[int, ...]], own: tuple[str, tuple[int, ...]]
) -> None:
    """TransportError for another dtype or shape."""
    if sent != own:
        raise TransportError(
            f"{name} was sent as {sent[0]} {list(sent[1])}, the receiver's is {own[0]} "
            f"{list(own[1])}; both sides need the same model in one dtype"
        )


def check_sum(name: str, found: int, wanted: int) -> None:
    """TransportError for other bytes."""
    if found != wanted:
        raise TransportError(
            f"{name} arrived with another checksum than it was sent with ({found:016x}, not "
            f"{wanted:016x}); the engine's weights are not to be used"
        )
