"""The modules of a decoder that serves adapters, and who tells them which row has which.

A wrapper keeps the A and B of a few slots; each row of a step says which slot it wants, or none,
and the adapter ops add to the rows that want one. Recorded and interpreted alike.

A and B are float32 whatever the model computes in, as in training: one op for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from sterna.kernels import lora_ops
from sterna.model.peft import PeftFile
from sterna.quant.adapted import GATED, Span, Wrapper, wide_product


class RowSlots:
    """The slot of each row of the step: of its tokens, and of its output rows. -1 = none."""

    def __init__(self, max_tokens: int, device: str) -> None:
        self._host = torch.full((2, max_tokens), -1, dtype=torch.int32)
        self._device = self._host if device == "cpu" else self._host.to(device)
        self.tokens, self.outputs = self._host.numpy()
        self._num_tokens = 0
        self._num_outputs = 0
        self.is_on = False

    def begin(self, num_tokens: int, num_outputs: int) -> None:
        """The counts of the step to come; its slots are written."""
        self._num_tokens, self._num_outputs = num_tokens, num_outputs
        if self._device is not self._host:
            self._device.copy_(self._host)

    def of(self, x: Tensor) -> Tensor:
        """[T] int32 for rows of tokens, [R] for output rows; x tells by its length.

        T = R means that every row is an output row: both say the same. A step is recorded with
        R < T (engine.py sees to it).
        """
        of_tokens = len(x) == self._num_tokens
        assert of_tokens or len(x) == self._num_outputs, "rows of another step"
        return self._device[0 if of_tokens else 1, : len(x)]


@dataclass(frozen=True, slots=True)
class Part:
    """Outputs [start, start + size) of a weight: rows [row, row + size) of B of `span`."""

    span: Span
    start: int
    size: int
    row: int = 0


def parts_of(spans: Sequence[Span], is_gated: bool) -> tuple[Part, ...]:
    """One part a span; two where gate and up are one in checkpoints (Phi-3) and share A."""
    if not (is_gated and len(spans) == 1):
        return tuple(Part(span, span.start, span.size) for span in spans)
    half = spans[0].size // 2
    return (Part(spans[0], 0, half), Part(spans[0], half, half, half))


class Slots(Wrapper):
    """One weight with the adapters of all slots."""

    def __init__(
        self, base: nn.Module, spans: Sequence[Span], rows: RowSlots, num_slots: int, max_rank: int
    ) -> None:
        super().__init__(base)
        self.parts = parts_of(spans, isinstance(base, GATED))
        self.in_features = _in_features(base)
        self._rows = rows
        device = next(chain(base.parameters(), base.buffers())).device
        # Not zeroed: ranks and scales say what is there, and untouched memory is not taken.
        size = max_rank * self.in_features
        self.a = [torch.empty(num_slots, size, device=device) for _ in self.parts]
        sizes = [max_rank * part.size for part in self.parts]
        self.b = [torch.empty(num_slots, size, device=device) for size in sizes]
        self.scales = torch.zeros(len(self.parts), num_slots, device=device)
        self.ranks = torch.zeros_like(self.scales, dtype=torch.int32)

    def put(self, slot: int, found: PeftFile) -> None:
        """Copy an adapter's part of this weight into a slot."""
        self.scales[:, slot] = 0.0
        for p, part in enumerate(self.parts):
            roles = found.modules.get(part.span.name)
            if roles is None:
                continue
            rows = roles["B"][part.row : part.row + part.size]
            for memory, value in ((self.a[p], roles["A"]), (self.b[p], rows)):
                memory[slot, : value.numel()] = value.reshape(-1).to(memory)
            self.ranks[p, slot] = roles["A"].shape[0]
            self.scales[p, slot] = found.scale(part.span.name)


class SlotsLinear(Slots):
    """In place of Linear or QuantLinear."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [T, K] -> [T, N]; `residual` [T, N] is added."""
        y: Tensor = self.base(x, residual)
        if self._rows.is_on:
            starts = [0, *(part.start + part.size for part in self.parts)]
            lora_ops.lora(x, y, self._rows.of(x), self.a, self.b, self.scales, self.ranks, starts)
        return y


class SlotsGated(Slots):
    """In place of GatedLinear or QuantGatedLinear."""

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> act(gate) * up, [T, I]."""
        base = self.base
        if not self._rows.is_on:
            plain: Tensor = base(x)
            return plain
        product, slots = wide_product(base, x), self._rows.of(x)
        of = (self.a, self.b, self.scales, self.ranks, base.activation, base.out_features)
        return lora_ops.lora_gated(x, product, slots, *of)


def _in_features(base: nn.Module) -> int:
    if hasattr(base, "in_features"):
        return int(base.in_features)  # type: ignore[arg-type]
    weight = base.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[1] if weight.dim() == 2 else weight.shape[1] * weight.shape[3])
