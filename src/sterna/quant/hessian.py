"""Hessians of the layers' squared output error: H = mean of x x^T over calibration tokens.

Captured by hooks on the forward that serves, block by block: the hidden states of all windows walk
through one block at a time, so only that block's Hessians are in memory (0.9 GB for an 8B model's
widest). Inputs are those of the plain model, not of one whose earlier layers are quantised: every
weight is then independent of the others, and a stopped run goes on to the same result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sterna.core.errors import QuantizeError
from sterna.model.decoder import Decoder
from sterna.model.layers import GatedLinear, Linear
from sterna.quant.calibrate import WINDOW, windows
from sterna.quant.stream import block_of, hooked, walk_block

# Fewer tokens than inputs leave directions in which a weight may move at no cost that the text
# can see: int4 fitted to 512 tokens of a 576-wide model was worse than rounding elsewhere.
MIN_TOKENS = 2048


class Hessians:
    """H [K, K] float32 of each weight, made when asked for; ask in the decoder's order.

    Raises QuantizeError, naming `source`, for less than MIN_TOKENS tokens.
    """

    def __init__(self, decoder: Decoder, tokens: Sequence[int], source: str) -> None:
        if len(tokens) < MIN_TOKENS:
            raise QuantizeError(
                f"calibration text {source}: {len(tokens)} tokens, GPTQ needs at least "
                f"{MIN_TOKENS}; ten thousand or more of the kind of text the model will see"
            )
        self._decoder = decoder
        self._source = source
        length = min(WINDOW, decoder.config.num_positions)
        self._batches = list(windows(tokens, length))
        self._head = "embed_tokens" if decoder.lm_head is None else "lm_head"
        self._rewind()
        self.digest = hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).hexdigest()

    def get(self, name: str) -> Tensor | None:
        """The Hessian of a weight; None for an embedding that is no head (a lookup has none)."""
        if name not in (self._head, *self._names()):
            return None
        if self._is_past(name):
            self._rewind()
        while name not in self._found:
            self._advance()
        return self._found[name]

    def _names(self) -> list[str]:
        return [name for name, _ in self._linears(self._decoder)]

    @staticmethod
    def _linears(module: nn.Module) -> list[tuple[str, nn.Module]]:
        kinds = Linear | GatedLinear
        return [(name, m) for name, m in module.named_modules() if isinstance(m, kinds)]

    def _is_past(self, name: str) -> bool:
        if name in self._found or name == self._head:
            return False
        return int(name.split(".")[1]) < self._next_layer

    def _rewind(self) -> None:
        self._next_layer = 0
        self._hidden: list[Tensor] = []
        self._found: dict[str, Tensor] = {}

    @torch.no_grad()
    def _advance(self) -> None:
        """Walk the hidden states through the next block, or through the last norm."""
        decoder, i = self._decoder, self._next_layer
        if i == 0:
            self._hidden = [decoder.embedded(batch) for batch in self._batches]
        self._found = {}  # freed before the next ones come
        sums = _Sums()
        if i == len(decoder.layers):
            for hidden in self._hidden:
                sums.add(self._head, decoder.norm(hidden))
        else:
            kinds = Linear | GatedLinear
            with block_of(decoder, i) as block, hooked(block, f"layers.{i}.", kinds, sums.hook):
                walk_block(decoder, block, i, self._batches, self._hidden)
        self._next_layer += 1
        self._found = sums.means(self._source)


class _Sums:
    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count: dict[str, int] = {}

    def add(self, name: str, x: Tensor) -> None:
        """x [T, K]."""
        x = x.float()
        if name not in self._sums:
            self._sums[name] = x.new_zeros(x.shape[1], x.shape[1])
            self._count[name] = 0
        self._sums[name].addmm_(x.t(), x)
        self._count[name] += len(x)

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: self.add(name, args[0])

    def means(self, source: str) -> dict[str, Tensor]:
        for name, total in self._sums.items():
            mean = total.div_(self._count[name])
            if not bool(torch.isfinite(mean.diagonal()).all()):
                raise QuantizeError(
                    f"calibration text {source}: the inputs of {name} are not finite; the model "
                    "itself fails on this text"
                )
        return self._sums
