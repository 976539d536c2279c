"""A decoder whose blocks are read from the checkpoint when they are needed, one at a time.

Weights that are fused here (qkv, gate and up) are stacked from several tensors of a file, which
copies them: of an 8B model in bfloat16 that is 9 GB which no other page can take the place of. A
streamed decoder keeps embedding, last norm and head, mapped where the file has them in its dtype,
and holds one block besides. What walks a decoder block by block serves plain ones alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sterna.model.batch import Batch
from sterna.model.decoder import Decoder
from sterna.model.layers import Block
from sterna.model.weights import read_parameter
from sterna.quant.sources import Checkpoint

OnLayer = Callable[[int, int], None]  # layers done, of how many


class StreamedDecoder(Decoder):
    """`decoder.layers` are empty ("meta"); reach them by `block_of` and `weight_of`."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__(checkpoint.config, dtype, "meta", rope_device="cpu")
        self._checkpoint = checkpoint
        for name, parameter in list(self.named_parameters()):
            if not name.startswith("layers."):
                put_parameter(self, name, self.read(name, parameter.shape))

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """A parameter's value from the checkpoint; errors as `read_parameter`."""
        c = self._checkpoint
        return read_parameter(c.source, name, c.names, shape, self.dtype)


def put_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put `value`, which needs no gradient, in the place of parameter `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))


def weight_of(decoder: Decoder, name: str) -> Tensor:
    """A parameter's value, read from the checkpoint when the decoder is streamed."""
    parameter = decoder.get_parameter(name).detach()
    if parameter.is_meta and isinstance(decoder, StreamedDecoder):
        return decoder.read(name, parameter.shape)
    return parameter


@contextlib.contextmanager
def block_of(decoder: Decoder, layer_idx: int) -> Iterator[Block]:
    """A block with its weights; a streamed decoder's are dropped at the end."""
    block = decoder.layers[layer_idx]
    assert isinstance(block, Block)
    if not isinstance(decoder, StreamedDecoder):
        yield block
        return
    empty = dict(block.named_parameters())
    try:
        for name, parameter in empty.items():
            value = decoder.read(f"layers.{layer_idx}.{name}", parameter.shape)
            put_parameter(block, name, value)
        yield block
    finally:
        for name, parameter in empty.items():
            put_parameter(block, name, parameter.detach())


@contextlib.contextmanager
def hooked(
    block: nn.Module,
    prefix: str,
    kinds: Any,
    hook: Callable[[str], Callable[[nn.Module, tuple[Any, ...]], None]],
) -> Iterator[None]:
    """Call hook(prefix + name) before the forward of every module of `kinds` in the block."""
    handles = [
        module.register_forward_pre_hook(hook(prefix + name))
        for name, module in block.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def walk_block(
    decoder: Decoder, block: Block, layer_idx: int, batches: Sequence[Batch], hidden: list[Tensor]
) -> None:
    """Every window's hidden states [T, D] through one block, in place of the list's."""
    table = decoder.rope_of(layer_idx)
    for i, batch in enumerate(batches):
        hidden[i] = block(hidden[i], batch, table, None)
