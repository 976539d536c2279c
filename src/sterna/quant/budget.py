"""A format for every weight, so that the predicted KL is smallest at N bits a weight.

A weight's cost in a format is 1/2 sum over rows i and inputs k of F_i (W - Q)_ik^2 H_kk, with F
the sensitivity of the layer's outputs (`sensitivity.py`) and H the mean squares of its inputs, for
rounding to nearest. Costs of different weights add up, for their errors are independent.

Choosing one format a weight within a number of bytes is a knapsack with choices. The greedy way
takes, again and again, the step with the largest fall of cost for a byte along a weight's lower
convex hull; it is optimal but for the last step (Sinha and Zoltners 1979).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sterna.core.errors import QuantizeError
from sterna.model.decoder import Decoder
from sterna.quant.formats import WeightFormat, parse_format
from sterna.quant.linear import weight_shapes
from sterna.quant.report import row_errors
from sterna.quant.rtn import quantize_weight
from sterna.quant.stream import weight_of

# From 4 to 8 bits, the better ones of each width.
CANDIDATES = ("int4-g128", "int4-g32", "int5-g128", "int5-g64", "fp6", "fp6-g128", "int6-g64",
              "int8", "int8-g64")  # fmt: skip
_HEADER_BYTES = 800  # a weight's share of the container's header


@dataclass(frozen=True, slots=True)
class Choice:
    """One weight in one format. cost: its part of the mean KL a token, in nats."""

    name: str
    format: WeightFormat
    num_bytes: int
    cost: float


def price_formats(
    decoder: Decoder,
    importance: Mapping[str, Tensor],
    sensitivity: Mapping[str, Tensor],
    candidates: Sequence[str] = CANDIDATES,
    on_weight: Callable[[int, int], None] | None = None,
) -> list[Choice]:
    """Every weight of a plain decoder in every candidate; rounds each once a candidate.

    importance [K] and sensitivity [rows] by module name. Weights without them (an embedding that
    is no head) are priced by their plain squared error.
    """
    formats = [parse_format(name) for name in candidates]
    shapes = list(weight_shapes(decoder))
    found: list[Choice] = []
    for i, (name, *_, is_gated) in enumerate(shapes):
        plain = weight_of(decoder, f"{name}.weight").float()
        h, f = importance.get(name), sensitivity.get(name)
        for fmt in formats:
            weight = quantize_weight(
                plain, fmt, search="fast", importance=h, is_gated=is_gated, name=name
            )
            by_row = row_errors(plain.chunk(1 + is_gated), weight, h)
            cost = by_row.sum() if f is None else by_row @ f
            found.append(Choice(name, fmt, weight.nbytes, float(cost) / 2))
        if on_weight is not None:
            on_weight(i + 1, len(shapes))
    return found


def choose_formats(
    choices: Iterable[Choice], decoder: Decoder, bits: float
) -> dict[str, WeightFormat]:
    """A format for every weight at no more than `bits` a parameter, unquantised ones included.

    Raises QuantizeError for a budget below what the smallest formats need.
    """
    hulls: dict[str, list[Choice]] = {}
    for choice in choices:
        hulls.setdefault(choice.name, []).append(choice)
    hulls = {name: _hull(options) for name, options in hulls.items()}
    parameters = dict(decoder.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    rest = sum(
        2 * p.numel() for n, p in parameters.items() if n.removesuffix(".weight") not in hulls
    )
    left = bits * total / 8 - rest - len(hulls) * _HEADER_BYTES
    left -= sum(hull[0].num_bytes for hull in hulls.values())
    if left < 0:
        least = bits - 8 * left / total
        raise QuantizeError(f"{bits:g} bits a weight; at least {least:.3f} are needed here")
    return {name: choice.format for name, choice in _greedy(hulls, left).items()}


def _greedy(hulls: Mapping[str, list[Choice]], left: float) -> dict[str, Choice]:
    """Spend `left` bytes on steps along the hulls, the largest fall of cost for a byte first."""
    place = dict.fromkeys(hulls, 0)
    steps = [(-_fall(hull, 0), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, name = heapq.heappop(steps)
        hull, i = hulls[name], place[name]
        more = hull[i + 1].num_bytes - hull[i].num_bytes
        if more > left:
            continue  # too large a step for what is left; others may still fit
        left -= more
        place[name] = i + 1
        if i + 2 < len(hull):
            heapq.heappush(steps, (-_fall(hull, i + 1), name))
    return {name: hulls[name][i] for name, i in place.items()}


def _fall(hull: list[Choice], i: int) -> float:
    """Cost saved for a byte by the step from i to i + 1."""
    return (hull[i].cost - hull[i + 1].cost) / (hull[i + 1].num_bytes - hull[i].num_bytes)


def _hull(options: list[Choice]) -> list[Choice]:
    """The lower convex hull of (bytes, cost): rising bytes, falling cost, falling gains."""
    hull: list[Choice] = []
    for option in sorted(options, key=lambda c: (c.num_bytes, c.cost)):
        if hull and option.cost >= hull[-1].cost:
            continue
        while hull and hull[-1].num_bytes == option.num_bytes:
            hull.pop()
        hull.append(option)
        while len(hull) > 2 and _fall(hull, len(hull) - 2) > _fall(hull, len(hull) - 3):
            del hull[-2]
    return hull
