"""Number formats of quantised weights, and exact encoding into their codes.

A floating format eXmY has code = sign << (X + Y) | exponent << Y | mantissa with bias
2^(X - 1) - 1, subnormals, no infinity and no NaN: every code is a number (e4m3 keeps its two NaN
codes out of use and reads them as +-448). An integer format is two's complement; its most
negative code is never written, so the grid is symmetric. Every value is exact in bfloat16.

Encoding rounds to nearest, ties to even, and saturates at the largest value. Sources: FP6-LLM
(arXiv 2401.14112) section 2.2 and ZeroQuant(4+2) (2312.08583) section 4 for e3m2 and e2m2; OCP
Microscaling 1.0 section 5.3 for e2m3, e2m1 and the e8m0 scale. e2m3 is the default of six bits:
on rows without outliers its error is 5 dB below that of e3m2 at the same size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from sterna.core.errors import ConfigError
from sterna.core.lookup import nearest

ScaleKind = Literal["float32", "float16", "e8m0"]
SCALE_DTYPES: Mapping[ScaleKind, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "float16": torch.float16, "e8m0": torch.uint8}
)
GROUP_SIZES = (32, 64, 128)
_MANTISSA_F32 = 23
_BIAS_F32 = 127


@dataclass(frozen=True, slots=True)
class Element:
    """What one code means. levels: the magnitudes by index; else exponent_bits 0 = integer."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    max_value: float
    levels: tuple[float, ...] = ()

    @property
    def bits(self) -> int:
        """Bits a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def values(self) -> tuple[float, ...]:
        """The value of each of the 2^bits codes."""
        return tuple(self._value(code) for code in range(1 << self.bits))

    @property
    def has_zero(self) -> bool:
        """Whether zero is a value. Without, groups of zeros are stored with a scale of zero."""
        return not self.levels or self.levels[0] == 0

    @property
    def bias(self) -> int:
        """What the exponent field is too high by."""
        return (1 << (self.exponent_bits - 1)) - 1

    def _value(self, code: int) -> float:
        sign_bit = 1 << (self.bits - 1)
        body = code & (sign_bit - 1)
        if self.levels:
            return -self.levels[body] if code & sign_bit else self.levels[body]
        if not self.exponent_bits:
            return float(body - (code & sign_bit))
        exponent, mantissa = divmod(body, 1 << self.mantissa_bits)
        hidden = (1 << self.mantissa_bits) if exponent else 0
        unit = 2.0 ** (max(exponent, 1) - self.bias - self.mantissa_bits)
        magnitude = min((hidden + mantissa) * unit, self.max_value)
        return -magnitude if code & sign_bit else magnitude


def _float(exponent_bits: int, mantissa_bits: int, max_value: float) -> Element:
    return Element(f"e{exponent_bits}m{mantissa_bits}", exponent_bits, mantissa_bits, max_value)


def _integer(bits: int) -> Element:
    return Element(f"int{bits}", 0, bits - 1, float((1 << (bits - 1)) - 1))


def _levels(*magnitudes: int) -> Element:
    bits = len(magnitudes).bit_length()  # of the index, and a sign
    return Element(f"nf{bits}", 0, bits - 1, float(magnitudes[-1]), tuple(map(float, magnitudes)))


# Levels of least expected squared error for normal weights in groups of 128 under the scale that
# the search picks: Lloyd's iteration (1957) over many groups, scales searched anew in each round,
# in 127ths so that a value is one byte. Zero is not among them: a symmetric table that holds it
# loses a level, 0.15 dB of 33.1 with 6 bits, 0.3 of 27.2 with 5 and 0.6 with 4.
_NORMAL = (
    _levels(2, 5, 8, 11, 14, 17, 20, 23, 27, 30, 33, 36, 39, 43, 46, 49, 52, 56, 59, 63, 67, 70, 74,
            78, 83, 87, 92, 97, 103, 110, 118, 127),
    _levels(3, 8, 14, 20, 25, 31, 38, 44, 51, 58, 66, 74, 83, 94, 108, 127),
    _levels(6, 18, 30, 43, 58, 74, 96, 127),
)  # fmt: skip

ELEMENTS: Mapping[str, Element] = MappingProxyType(
    {
        element.name: element
        for element in (
            _float(2, 3, 7.5), _float(3, 2, 28.0), _float(2, 2, 7.0), _float(2, 1, 6.0),
            _float(4, 3, 448.0), _integer(4), _integer(5), _integer(6), _integer(8), *_NORMAL,
        )
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How a weight is stored: elements (two = chosen by row), scale granularity and scale kind.

    group_size 0 = one scale a row, else one for `group_size` neighbouring k of a row.
    """

    name: str
    elements: tuple[Element, ...]
    group_size: int = 0
    scale: ScaleKind = "float32"

    @property
    def bits(self) -> int:
        """Bits a code."""
        return self.elements[0].bits

    @property
    def is_mixed(self) -> bool:
        """Whether each row picks its element."""
        return len(self.elements) > 1

    def table(self) -> Tensor:
        """float32 [elements, 2^bits]: the value of each code."""
        return value_table(tuple(element.name for element in self.elements)).clone()


@cache
def value_table(names: tuple[str, ...]) -> Tensor:
    """float32 [len(names), 2^bits] of elements of one width."""
    return torch.tensor([ELEMENTS[name].values for name in names], dtype=torch.float32)


def _format(
    name: str, *elements: str, group: int = 0, scale: ScaleKind = "float32"
) -> WeightFormat:
    return WeightFormat(name, tuple(ELEMENTS[e] for e in elements), group, scale)


# Names as users write them; `-gN` may follow any but the MX ones (their group is their format).
FORMATS: Mapping[str, WeightFormat] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            _format("fp6", "e2m3"),
            _format("fp6-e3m2", "e3m2"),
            _format("fp6-mixed", "e2m3", "e3m2"),
            _format("fp5", "e2m2"),
            _format("fp4", "e2m1"),
            _format("fp8", "e4m3"),
            _format("int4", "int4"),
            _format("int5", "int5"),
            _format("int6", "int6"),
            _format("int8", "int8"),
            _format("nf6", "nf6"),
            _format("nf5", "nf5"),
            _format("nf4", "nf4"),
            _format("mxfp4", "e2m1", group=32, scale="e8m0"),
            _format("mxfp6", "e2m3", group=32, scale="e8m0"),
            _format("mxfp6-e3m2", "e3m2", group=32, scale="e8m0"),
        )
    }
)
_GROUPED = re.compile(r"(?P<base>.+)-g(?P<size>\d+)")


def parse_format(name: str, scale: ScaleKind | None = None) -> WeightFormat:
    """The format of a name such as `fp6`, `fp6-e3m2`, `int4-g32`; `scale` overrides its kind.

    Scales default to float32 a row and float16 a group (at 576 inputs 0.06 bits a weight, at a
    group of 128 0.13). Raises ConfigError for an unknown name, with the nearest known one.
    """
    match = _GROUPED.fullmatch(name)
    fmt = FORMATS.get(match["base"] if match else name)
    if fmt is None:
        raise ConfigError(_unknown_format(name), param="format")
    if match:
        fmt = _grouped(fmt, name, int(match["size"]))
    if scale is not None and fmt.scale != scale:
        if scale == "e8m0" and not all(element.has_zero for element in fmt.elements):
            raise ConfigError(
                f"format {name!r} with e8m0 scales: neither has a zero for groups of zeros; use "
                "float16 or float32 scales",
                param="scale",
            )
        fmt = replace(fmt, scale=scale)
    return fmt


def _grouped(fmt: WeightFormat, name: str, size: int) -> WeightFormat:
    if size not in GROUP_SIZES or fmt.group_size:
        sizes = ", ".join(map(str, GROUP_SIZES))
        allowed = f"its group is {fmt.group_size}" if fmt.group_size else f"groups are {sizes}"
        raise ConfigError(f"format {name!r}: group of {size}; {allowed}", param="format")
    return replace(fmt, name=name, group_size=size, scale="float16")


def _unknown_format(name: str) -> str:
    known = [*FORMATS, *(f"{base}-g{n}" for base in ("fp6", "int4") for n in GROUP_SIZES)]
    hint = nearest(name, known)
    meant = f"; did you mean {hint!r}?" if hint else ""
    groups = "/".join(map(str, GROUP_SIZES))
    return f"unknown format {name!r}{meant} (known: {', '.join(FORMATS)}; with -gN, N = {groups})"


def encode(x: Tensor, element: Element) -> Tensor:
    """float32 of any shape -> codes uint8: nearest value, ties to even, saturated.

    NaN has no code; callers refuse it before.
    """
    if element.levels:
        index = _nearest_level(x.abs(), element).to(torch.uint8)
        return index.bitwise_or_(x.signbit().to(torch.uint8) << (element.bits - 1))
    if not element.exponent_bits:
        limit = element.max_value
        return x.round().clamp_(-limit, limit).to(torch.int8).view(torch.uint8) & (
            (1 << element.bits) - 1
        )
    magnitude = x.abs().clamp_(max=element.max_value)
    binade = _to_binades_(magnitude.view(torch.int32).clone(), element)
    # q = magnitude in units of its binade's step; a carry into the next binade adds up right,
    # since code = (binade - lowest) << mantissa_bits | q for subnormals and normals alike.
    step = ((2 * _BIAS_F32 + element.mantissa_bits) << _MANTISSA_F32) - binade
    q = magnitude.mul_(step.view(torch.float32)).round_()
    lowest = (_BIAS_F32 + 1 - element.bias) << _MANTISSA_F32
    body = (binade - lowest >> (_MANTISSA_F32 - element.mantissa_bits)).add_(q.int())
    sign = x.signbit().to(torch.uint8) << (element.bits - 1)
    return body.to(torch.uint8).bitwise_or_(sign)


def round_to_grid(x: Tensor, element: Element) -> Tensor:
    """float32 -> the nearest values of the element; `decode(encode(x))`, without codes."""
    return round_to_grid_(x.clone(), torch.empty_like(x), element)


def round_to_grid_(x: Tensor, scratch: Tensor, element: Element) -> Tensor:
    """`round_to_grid` in place; `scratch` of x's shape is written over."""
    if element.levels:
        torch.abs(x, out=scratch)
        return torch.copysign(
            _magnitudes(element).to(x.device)[_nearest_level(scratch, element)], x, out=x
        )
    x.clamp_(-element.max_value, element.max_value)
    if not element.exponent_bits:
        return x.round_()
    # Adding and taking away 1.5 * 2^23 steps rounds to the step in float32, ties to even.
    torch.abs(x, out=scratch)
    _to_binades_(scratch.view(torch.int32), element)
    scratch.mul_(1.5 * 2.0 ** (_MANTISSA_F32 - element.mantissa_bits))
    return x.add_(scratch).sub_(scratch)


def _nearest_level(magnitude: Tensor, element: Element) -> Tensor:
    """Indices int32 of the nearest levels, ties to the even one."""
    bounds = _boundaries(element).to(magnitude.device)
    return torch.bucketize(magnitude, bounds, out_int32=True)


@cache
def _magnitudes(element: Element) -> Tensor:
    return torch.tensor(element.levels, dtype=torch.float32)


@cache
def _boundaries(element: Element) -> Tensor:
    """The largest magnitude of each level but the last: a tie is below when the index is even."""
    levels = _magnitudes(element)
    middle = (levels[1:] + levels[:-1]) / 2  # exact: halves of small whole numbers
    below = torch.nextafter(middle, torch.zeros(()))
    return torch.where(torch.arange(len(middle)) % 2 == 0, middle, below)


def decode(codes: Tensor, element: Element) -> Tensor:
    """Codes uint8 -> their values, float32."""
    return value_table((element.name,))[0].to(codes.device)[codes.int()]


def _to_binades_(bits: Tensor, element: Element) -> Tensor:
    """Bits of magnitudes -> of the powers of two at or below them, from the smallest normal up."""
    lowest = (_BIAS_F32 + 1 - element.bias) << _MANTISSA_F32
    return bits.bitwise_and_(0xFF << _MANTISSA_F32).clamp_(min=lowest)
