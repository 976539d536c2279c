"""Modules of a decoder with a frozen base and low-rank adapters beside it.

LoRA, a part of a weight at a time (q, k and v of the stacked qkv have an adapter each):

    y = round(base(x)) + s * dropout(x) A^T B^T                     rounded again, once

DoRA scales every output row by m / |W + s B A| (the norm is a constant for the gradient):

    y = m / |W + s B A| * (x W^T + s x A^T B^T) + bias + residual   rounded once

`gate_up` has its activation inside the fused op, so with an adapter its two products are kept in
float32, added to, and act(gate) * up is rounded once: the rounding rule of `gated_linear`. The
float32 product comes from the `logits` op, which is the same walk over K without the rounding.

While B is zero (and m is the norm) the value is the base's own output to the bit, whichever
path computes the gradient; so a run starts exactly at its base model. A and B are float32
whatever the base is. Training only: merge before serving.

Legend: T tokens, K in_features, N out_features (all parts), n rows of a part, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sterna.kernels.lora import OneAdapter, Pair, lora_act, lora_add
from sterna.kernels.quant_weight import drop_half_padding
from sterna.model.layers import GatedLinear, Linear
from sterna.quant.adapted import GATED, Span, Wrapper, wide_product

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class AdapterPart(nn.Module):
    """A [r, K], B [n, r] and, for DoRA, magnitudes [n] of one part of a weight."""

    magnitude: nn.Parameter | None

    def __init__(
        self, span: Span, rank: int, alpha: float, scaling: float, in_features: int, dropout: float
    ) -> None:
        super().__init__()
        self.span = span
        self.rank = rank
        self.alpha = alpha
        self.scaling = scaling
        self.dropout = dropout
        self.A = nn.Parameter(torch.zeros(rank, in_features))
        self.B = nn.Parameter(torch.zeros(span.stop - span.start, rank))
        self.magnitude = None

    def init_a(self, generator: torch.Generator) -> None:
        """A uniform in +-1 / sqrt(K), as in PEFT (Kaiming with a = sqrt(5)); B stays 0."""
        bound = self.A.shape[1] ** -0.5
        with torch.no_grad():
            self.A.uniform_(-bound, bound, generator=generator)

    def add_magnitude(self, weight: Tensor) -> None:
        """DoRA's magnitudes: the row norms of `weight` [n, K] with this part's delta."""
        self.magnitude = nn.Parameter(self.norms(weight))

    def delta(self, x: Tensor) -> Tensor:
        """x [T, K] -> s * dropout(x) A^T B^T, float32 [T, n]."""
        inner = F.dropout(x.to(self.A.dtype), self.dropout, self.training)
        out: Tensor = F.linear(F.linear(inner, self.A), self.B) * self.scaling
        return out

    @torch.no_grad()
    def norms(self, weight: Tensor) -> Tensor:
        """Row norms [n] of weight + s B A, float32."""
        out: Tensor = torch.linalg.vector_norm(self._moved(weight), dim=1)
        return out

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """weight [n, K] of any dtype -> the weight that does what base and adapter do, float32."""
        moved = self._moved(weight)
        if self.magnitude is None:
            return moved
        return moved * (self.magnitude / self.norms(weight))[:, None]

    def _moved(self, weight: Tensor) -> Tensor:
        return weight.to(self.A) + self.scaling * (self.B @ self.A)


class AdaptedModule(Wrapper):
    """A base with one AdapterPart for each adapted part of its weight."""

    def __init__(self, base: nn.Module, spans: tuple[Span, ...], is_dora: bool) -> None:
        super().__init__(base)
        self.spans = spans
        self.is_dora = is_dora
        self.is_on = True
        self.parts = nn.ModuleDict()
        self._one: OneAdapter | None = None

    def add(self, part: AdapterPart) -> None:
        """Adapt one more of the spans."""
        if self.is_dora:
            part.add_magnitude(self.rows(part.span))
        self.parts[part.span.leaf] = part
        self._one = None

    def adapters(self) -> Iterator[AdapterPart]:
        """The parts, in the order of the stacked weight."""
        for span in self.spans:
            if span.leaf in self.parts:
                part = self.parts[span.leaf]
                assert isinstance(part, AdapterPart)
                yield part

    def rows(self, span: Span) -> Tensor:
        """The base's weight of one part, [n, K], dequantised when it is packed."""
        base = self.base
        is_plain = isinstance(base, Linear | GatedLinear)
        weight: Tensor = base.weight.detach() if is_plain else base.quant_weight.dequantize()
        return weight[span.start : span.stop]

    def is_identity(self) -> bool:
        """Whether the adapter changes nothing yet: B is zero, and m the norm of its row."""
        return not any(
            bool(part.B.any())
            or (part.magnitude is not None and not _is_at_norm(part, self.rows(part.span)))
            for part in self.adapters()
        )

    @property
    def has_dropout(self) -> bool:
        """Whether inputs are dropped now: each part draws its own, which the ops do not."""
        return self.training and any(part.dropout for part in self.adapters())

    def pairs(self) -> list[Pair]:
        """A and B of every span, None where it has no adapter."""
        by_leaf = {part.span.leaf: (part.A, part.B) for part in self.adapters()}
        return [by_leaf.get(span.leaf) for span in self.spans]

    def one(self) -> OneAdapter:
        """What the ops take besides: kept, since a recorded step holds its addresses."""
        if self._one is None:
            scales = {part.span.leaf: part.scaling for part in self.adapters()}
            factors = [scales.get(span.leaf, 0.0) for span in self.spans]
            self._one = self._new_one(factors, [0, *(span.stop for span in self.spans)])
        return self._one

    def _new_one(self, factors: list[float], starts: list[int]) -> OneAdapter:
        return OneAdapter.of(self.pairs(), factors, starts)

    def delta(self, x: Tensor) -> Tensor:
        """float32 [T, N]: every part's delta, zeros where a part has no adapter."""
        return torch.cat([self._span_delta(span, x) for span in self.spans], dim=-1)

    def _span_delta(self, span: Span, x: Tensor) -> Tensor:
        if span.leaf not in self.parts:
            return x.new_zeros((len(x), span.stop - span.start), dtype=torch.float32)
        delta: Tensor = self.parts[span.leaf].delta(x)  # type: ignore[operator]
        return delta

    def scaled(self, product: Tensor, x: Tensor) -> Tensor:
        """float32 x W^T [T, N] -> the adapted product, before bias and residual."""
        total = product + self.delta(x)
        return total * self._row_scales(product) if self.is_dora else total

    def _row_scales(self, product: Tensor) -> Tensor:
        scales = []
        for span in self.spans:
            if span.leaf not in self.parts:
                scales.append(product.new_ones(span.stop - span.start))
                continue
            part = self.parts[span.leaf]
            assert isinstance(part, AdapterPart) and part.magnitude is not None
            scales.append(part.magnitude / part.norms(self.rows(span)))
        return torch.cat(scales)


def _is_at_norm(part: AdapterPart, weight: Tensor) -> bool:
    assert part.magnitude is not None
    return torch.equal(part.magnitude, part.norms(weight))


class AdaptedLinear(AdaptedModule):
    """In place of Linear or QuantLinear."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [T, K] -> [T, N]; `residual` [T, N] is added."""
        if not self.is_on:
            plain: Tensor = self.base(x, residual)
            return plain
        if not self.is_dora:
            y: Tensor = self.base(x, residual)
            if self.has_dropout:
                return (y.float() + self.delta(x)).to(y.dtype)
            return lora_add(x, y, self.pairs(), self.one())
        y = self.scaled(_product(self.base, x), x)
        for term in (self.base.bias, residual):
            if term is not None:
                y = y + term.float()
        return start_at(y.to(x.dtype), lambda: self.base(x, residual), self.is_identity())


class AdaptedGated(AdaptedModule):
    """In place of GatedLinear or QuantGatedLinear."""

    def pairs(self) -> list[Pair]:
        """Of gate and up. Where checkpoints have both in one (Phi-3) they share A."""
        (first, *others) = found = super().pairs()
        if others or first is None:
            return found
        a, b = first
        return [(a, half) for half in b.chunk(2)]

    def _new_one(self, factors: list[float], starts: list[int]) -> OneAdapter:
        half = self.base.out_features
        return OneAdapter.of(self.pairs(), (factors * 2)[:2], (0, half, 2 * half))

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> act(gate) * up, [T, I]."""
        if not self.is_on:
            plain: Tensor = self.base(x)
            return plain
        if not (self.is_dora or self.has_dropout):
            product = wide_product(self.base, x)
            return lora_act(x, product, self.pairs(), self.one(), self.base.activation)
        gate, up = self.scaled(_product(self.base, x), x).chunk(2, dim=-1)
        y = (_ACTIVATIONS[self.base.activation](gate) * up).to(x.dtype)
        return start_at(y, lambda: self.base(x), self.is_identity())


def _product(base: Any, x: Tensor) -> Tensor:
    """x W^T in float32, unrounded, without padding: [T, N]."""
    product = wide_product(base, x)
    if not isinstance(base, GATED) or product.shape[1] == 2 * base.out_features:
        return product
    return drop_half_padding(product.t(), base.out_features).t()


class _StartAt(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def start_at(carrier: Tensor, value: Callable[[], Tensor], is_identity: bool) -> Tensor:
    """`carrier`, or the base's own bits with carrier's gradient while the adapter is zero."""
    if not is_identity:
        return carrier
    with torch.no_grad():
        exact = value()
    apply: Any = _StartAt.apply
    out: Tensor = apply(carrier, exact)
    return out
