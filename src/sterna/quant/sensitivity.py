"""How much the model's predictions mind an error in each row of each weight.

An error E of a weight costs, to second order, KL = 1/2 e^T F e with e = vec(E) and F the Fisher
information: the covariance of the gradient of ln p(t) for tokens t drawn from the model's own
predictions. Drawing independently at every position, one backward pass samples the sum over all
positions, with what an error at one position does to later ones. Kept are F's diagonal and of that
the rows: F_ik is taken as f_i h_k with h the mean squares of the inputs, so that

    KL a token = 1/2 sum over i, k of f_i h_k E_ik^2,   f_i = sum_k (dW)_ik^2 / sum of x^2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sterna.kernels import ops
from sterna.model.batch import Batch
from sterna.model.decoder import Decoder
from sterna.model.layers import GatedLinear, Linear
from sterna.quant.calibrate import WINDOW, windows

NUM_WINDOWS = 4


def row_sensitivities(decoder: Decoder, tokens: Sequence[int]) -> dict[str, Tensor]:
    """Weight name -> float32 [rows], the f of the module's docstring.

    Reads NUM_WINDOWS windows. The head's rows are those of the logits; what an error of a tied
    table does to the lookup is not counted. Weights get no gradients, so this costs about three
    forwards; a float32 decoder is faster than a bfloat16 one.
    """
    generator = torch.Generator().manual_seed(0)
    sums = _Squares()
    head = "embed_tokens" if decoder.lm_head is None else "lm_head"
    length = min(WINDOW, decoder.config.num_positions)
    kinds = Linear | GatedLinear
    handles = [
        module.register_forward_hook(sums.hook(name))
        for name, module in decoder.named_modules()
        if isinstance(module, kinds)
    ]
    wanted = [p for p in decoder.parameters() if p.requires_grad]
    decoder.requires_grad_(False)
    try:
        for batch in windows(tokens[: NUM_WINDOWS * length], length):
            _backward(decoder, batch, lambda x, g: sums.add(head, x, g), generator)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)
    return sums.means()


def _backward(
    decoder: Decoder,
    batch: Batch,
    on_logits: Callable[[Tensor, Tensor], None],
    generator: torch.Generator,
) -> None:
    h = decoder.embedded(batch).detach().requires_grad_()
    for layer_idx, block in enumerate(decoder.layers):
        h = block(h, batch, decoder.rope_of(layer_idx), None)
    hidden = decoder.norm(h)
    logits = decoder.logits(hidden)
    _on_gradient(logits, lambda g: on_logits(hidden.detach(), g))
    log_probs = logits.log_softmax(dim=-1)
    drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
    torch.autograd.backward(log_probs.gather(1, drawn).sum())


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
