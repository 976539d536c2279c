"""How much the model's predictions mind an error in each row of each weight.

An error E of a weight costs, to second order, KL = 1/2 e^T F e with e = vec(E) and F the Fisher
information: the covariance of the gradient of ln p(t) for tokens t drawn from the model's own
predictions. Drawing independently at every position, one backward pass samples the sum over all
positions, with what an error at one position does to later ones. Kept are F's diagonal and of that
the rows: F_ik is taken as f_i h_k with h the mean squares of the inputs, so that

    KL a token = 1/2 sum over i, k of f_i h_k E_ik^2,   f_i = sum_k (dW)_ik^2 / sum of x^2
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sterna.kernels import ops
from sterna.model.batch import Batch
from sterna.model.decoder import Decoder
from sterna.model.heads import Embedding, LMHead
from sterna.model.layers import GatedLinear, Linear
from sterna.quant.calibrate import WINDOW, windows
from sterna.quant.linear import QuantLMHead
from sterna.quant.stream import OnLayer, block_of

NUM_WINDOWS = 4


def row_sensitivities(
    decoder: Decoder, tokens: Sequence[int], on_layer: OnLayer | None = None
) -> dict[str, Tensor]:
    """Weight name -> float32 [rows], the f of the module's docstring.

    Reads NUM_WINDOWS windows. The head's rows are those of the logits; what an error of a tied
    table does to the lookup is not counted. Computed in float32, about four forwards. Blocks are
    taken one at a time, forwards and then backwards from the kept inputs of each: besides those
    (1.1 GB for 8B), one block in float32 is in memory, or the head.
    """
    length = min(WINDOW, decoder.config.num_positions)
    batches = list(windows(tokens[: NUM_WINDOWS * length], length))
    count, sums = len(decoder.layers), _Squares()
    inputs = [[decoder.embedded(batch).detach().float() for batch in batches]]
    for i in range(count):
        inputs.append(_forward(decoder, i, batches, inputs[-1]))
        if on_layer is not None:
            on_layer(i + 1, 2 * count)
    gradients = _through_head(decoder, inputs.pop(), sums)
    for i in reversed(range(count)):
        gradients = _backward(decoder, i, batches, inputs.pop(), gradients, sums)
        if on_layer is not None:
            on_layer(2 * count - i, 2 * count)
    return sums.means()


def _in_float32(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).float().requires_grad_(False)


@torch.no_grad()
def _forward(
    decoder: Decoder, layer_idx: int, batches: list[Batch], inputs: list[Tensor]
) -> list[Tensor]:
    with block_of(decoder, layer_idx) as block:
        exact = _in_float32(block)
    table = decoder.rope_of(layer_idx)
    return [exact(h, batch, table, None) for h, batch in zip(inputs, batches, strict=True)]


def _through_head(decoder: Decoder, hidden: list[Tensor], sums: _Squares) -> list[Tensor]:
    """Draws a token at every position; the gradients of ln p by the last block's outputs."""
    generator = torch.Generator().manual_seed(0)
    name = "embed_tokens" if decoder.lm_head is None else "lm_head"
    norm, head = _in_float32(decoder.norm), _in_float32(decoder.get_submodule(name))
    assert isinstance(head, Embedding | LMHead | QuantLMHead)
    found = []
    for last in hidden:
        h = last.requires_grad_()
        normed = norm(h)
        logits = head.logits(normed, decoder.config.logits_softcap)
        _on_gradient(logits, functools.partial(sums.add, name, normed.detach()))
        log_probs = logits.log_softmax(dim=-1)
        drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
        torch.autograd.backward(log_probs.gather(1, drawn).sum())
        found.append(_gradient(h))
    return found


def _backward(
    decoder: Decoder,
    layer_idx: int,
    batches: list[Batch],
    inputs: list[Tensor],
    gradients: list[Tensor],
    sums: _Squares,
) -> list[Tensor]:
    """Gradients by a block's outputs -> by its inputs; the weights' are squared on the way."""
    with block_of(decoder, layer_idx) as block:
        exact = _in_float32(block)
    for name, module in exact.named_modules():
        if isinstance(module, Linear | GatedLinear):
            module.register_forward_hook(sums.hook(f"layers.{layer_idx}.{name}"))
    table, found = decoder.rope_of(layer_idx), []
    for h, batch, gradient in zip(inputs, batches, gradients, strict=True):
        h.requires_grad_()
        torch.autograd.backward(exact(h, batch, table, None), gradient)
        found.append(_gradient(h))
    return found


def _gradient(h: Tensor) -> Tensor:
    assert h.grad is not None
    return h.grad


def _on_gradient(output: Tensor, function: Callable[[Tensor], None]) -> None:
    register: Callable[..., Any] = output.register_hook
    register(function)


class _Squares:
    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count: dict[str, int] = {}

    def add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Inputs [T, K] and gradient [T, rows] of one sequence."""
        x = x.float()
        rows = (gradient.float().t() @ x).square_().sum(dim=1) / x.square().sum().clamp(min=1e-30)
        self._sums[name] = self._sums[name] + rows if name in self._sums else rows
        self._count[name] = self._count.get(name, 0) + 1

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        """Forward hook that adds the gradient of the module's output when it comes."""

        def forward(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach()
            if isinstance(module, GatedLinear):
                _on_gradient(output, lambda g: self.add(name, x, _through_gate(module, x, g)))
            else:
                _on_gradient(output, lambda g: self.add(name, x, g))

        return forward

    def means(self) -> dict[str, Tensor]:
        return {name: total / self._count[name] for name, total in self._sums.items()}


def _through_gate(module: GatedLinear, x: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of act(gate) * up -> that of [gate; up], [T, 2 * out_features]."""
    with torch.enable_grad():
        both = (x @ module.weight.detach().t()).requires_grad_()
        gate, up = both.chunk(2, dim=1)
        output = ops.activate(gate.contiguous(), module.activation) * up
        (found,) = torch.autograd.grad(output, both, gradient)
    return found
