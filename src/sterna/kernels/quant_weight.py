"""A quantised weight: tiles of codes, scales and the table of values that the codes stand for.

value(row, k) = table[row_formats[row]][code] * scale[row, k // group_size]

Formed in float32 with one rounding. The kernels do not form it: they sum code values times
activations within a group and multiply the sum by the scale.

Legend: R row blocks of 16, G groups of k (1 when a row has one scale), N rows, K in_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sterna.kernels.tiles import TILE_ROWS, unpack_tiles

# The flat form that the `quant_*` ops take, in their order, less x.
FlatWeight = tuple[Tensor, Tensor, Tensor, Tensor | None, int, int, int]


@dataclass(frozen=True, slots=True)
class QuantWeight:
    """One weight [out_features, in_features], or two stacked ones when `is_gated`.

    tiles [R, K64, 128 * bits] uint8 (layout: `tiles.py`); scales [R, G, 16] float32, float16, or
    uint8 e8m0 (2^(e - 127)); table [formats, 2^bits] float32, exact in bfloat16; row_formats
    [R, 16] uint8, the row of `table` a weight row uses, None = 0. group_size 0 = one scale a row.

    Gated (gate and up): out_features is that of one half, and each half is padded to whole row
    blocks by itself, so the gate's row blocks come first, then up's.
    """

    tiles: Tensor
    scales: Tensor
    table: Tensor
    row_formats: Tensor | None
    bits: int
    group_size: int
    in_features: int
    out_features: int
    is_gated: bool = False

    def flat(self) -> FlatWeight:
        """The arguments between x (or tokens) and the rest of every `quant_*` op."""
        return (
            self.tiles,
            self.scales,
            self.table,
            self.row_formats,
            self.bits,
            self.group_size,
            self.in_features,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and row formats, padding included."""
        formats = 0 if self.row_formats is None else self.row_formats.nbytes
        return self.tiles.nbytes + self.scales.nbytes + formats

    def dequantize(self) -> Tensor:
        """float32 [out_features, in_features], or [2 * out_features, in_features] when gated."""
        values = dequantize_tiles(*self.flat())
        if not self.is_gated:
            return values[: self.out_features]
        return drop_half_padding(values, self.out_features)


def dequantize_tiles(
    tiles: Tensor,
    scales: Tensor,
    table: Tensor,
    row_formats: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """float32 [R * 16, in_features]: every row block, padding rows included."""
    codes = unpack_tiles(tiles, bits, in_features).int()
    if row_formats is not None:
        codes = codes + (row_formats.int().reshape(-1, 1) << bits)
    values = table.reshape(-1)[codes]
    return values * per_weight(scale_values(scales), group_size, in_features)


def int8_unit(table: Tensor) -> float:
    """What every value of `table` is a whole number of, for integer sums; 0 when there is none.

    The largest power of two; none when a quotient needs more than two int8 planes, the second
    of which holds 16ths (e4m3: 448 is 229,376 times its smallest value).
    """
    unit, largest = 1.0, float(table.abs().max())
    while unit > 2.0**-20 and not bool((table / unit == (table / unit).floor()).all()):
        unit /= 2
    return unit if largest / unit < 127 * 16 else 0.0


def drop_half_padding(rows: Tensor, out_features: int) -> Tensor:
    """[2 * R/2 * 16, ...] of a gated weight -> [2 * out_features, ...]."""
    gate, up = rows.chunk(2)
    return torch.cat([gate[:out_features], up[:out_features]])


def scale_values(scales: Tensor) -> Tensor:
    """Stored scales as float32, exactly. uint8 is e8m0: 2^(e - 127)."""
    if scales.dtype != torch.uint8:
        return scales.float()
    # The byte is a float32's exponent field; e = 0 is the subnormal 2^-127.
    bits = torch.where(scales == 0, 0x0040_0000, scales.int() << 23)
    return bits.to(torch.int32).view(torch.float32)


def per_weight(scales: Tensor, group_size: int, in_features: int) -> Tensor:
    """[R, G, 16] -> [R * 16, in_features], or [R * 16, 1] with one scale a row."""
    by_row = scales.transpose(1, 2).reshape(scales.shape[0] * TILE_ROWS, scales.shape[1])
    if group_size == 0:
        return by_row
    return by_row.repeat_interleave(group_size, dim=1)[:, :in_features]
