"""The gradients of a step: summed over its micro-batches in float32.

Autograd would sum in the weight's dtype. In bfloat16 (8 bits) the eighth micro-batch then adds to
a sum that is rounded to 1/256 of itself each time. Of a single micro-batch, and of float32 weights,
the parameter's own gradient is the sum and no buffer exists (4 bytes a weight otherwise).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sterna.parallel.fsdp import average_gradients, average_tensors, local
from sterna.parallel.mesh import Axis


class Gradients:
    """Gradients of the trained weights of this rank. `begin`, then `add` after each backward."""

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        self._weights = [weight for weight in weights if weight.requires_grad]
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._is_summed = False

    def begin(self, num_micros: int) -> None:
        """A step of so many micro-batches follows."""
        self.clear()
        self._is_summed = num_micros > 1

    @torch.no_grad()
    def add(self) -> None:
        """Take over what a backward left in the parameters."""
        if not self._is_summed:
            return
        for weight in self._weights:
            if weight.grad is None or not self._has_sum(weight):
                continue
            grad = local(weight.grad)
            total = self._sums.get(weight)
            self._sums[weight] = grad.float() if total is None else total.add_(grad)
            weight.grad = None

    def average(self, axis: Axis) -> None:
        """Replace them by their mean over ranks that hold whole weights."""
        if axis.size == 1:
            return
        average_gradients((w for w in self._weights if not self._has_sum(w)), axis)
        if self._is_summed:
            for weight in self._weights:
                if self._has_sum(weight) and weight not in self._sums:
                    self._sums[weight] = torch.zeros_like(weight, dtype=torch.float32)
            average_tensors((self._sums[w] for w in self._weights if w in self._sums), axis)

    def of(self, weight: nn.Parameter) -> Tensor | None:
        """This rank's gradient of a weight, in its dtype or float32."""
        total = self._sums.get(weight)
        if total is not None:
            return total
        return None if weight.grad is None else local(weight.grad)

    def clear(self) -> None:
        """Forget them."""
        self._sums.clear()
        for weight in self._weights:
            weight.grad = None

    def square_sum(self) -> Tensor:
        """The sum of squares of this rank's gradients, float64 scalar on the CPU."""
        total = torch.zeros((), dtype=torch.float64)
        for weight in self._weights:
            grad = self.of(weight)
            if grad is not None:
                total += torch.linalg.vector_norm(grad, dtype=torch.float32).double().cpu() ** 2
        return total

    def _has_sum(self, weight: nn.Parameter) -> bool:
        return self._is_summed and weight.dtype.itemsize < 4  # float32, float64 sum themselves
