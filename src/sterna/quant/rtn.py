"""Round to nearest: scales, then codes. Every other quantiser starts from these scales.

A scale is rounded to the type it is stored in before any code is computed, so the codes are the
nearest ones for the scale that the kernels will read. Searched scales minimise

    sum over k of importance[k] * (w[k] - scale * q(w[k] / scale))^2

in each row (or group) over a grid of multiples of absmax / (largest code value). importance is 1,
or the mean square of the layer's input k (the diagonal of GPTQ's Hessian; AWQ's observation that
input channels differ). Multiples above 1 help floating formats, whose step depends on where in a
binade the large weights fall; below 1 they clip, which helps integers.

Weights are walked in runs of rows that stay in the second-level cache: 2.5 G weights/s a candidate
against 0.9 from memory (2 cores): on 135M weights the fast search takes 1.5 s, the full one 5 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sterna.core.errors import QuantizeError
from sterna.kernels.quant_weight import QuantWeight, scale_values
from sterna.kernels.tiles import TILE_ROWS, pack_tiles
from sterna.quant.formats import SCALE_DTYPES, Element, ScaleKind, WeightFormat, encode
from sterna.quant.formats import round_to_grid as to_grid

ScaleSearch = Literal["absmax", "fast", "mse"]
# Grid points of a search, absmax included. Gaussian rows of 576 in fp6: 31.16, 31.38, 31.48 dB.
_POINTS = {"absmax": 1, "fast": 12, "mse": 45}
_LOWEST, _HIGHEST = 0.6, 1.5
_RUN_ELEMS = 1 << 18
_MAX_E8M0 = 254
_LARGEST = {torch.float16: 65504.0, torch.float32: 3.0e38}
_SMALLEST = {torch.float16: 2.0**-24, torch.float32: 2.0**-126}


@dataclass(frozen=True, slots=True)
class Rows:
    """Codes and scales of some rows, before tiling. codes [N, K], scales [N, G], formats [N]."""

    codes: Tensor
    scales: Tensor
    formats: Tensor | None


def quantize_weight(
    weight: Tensor,
    fmt: WeightFormat,
    *,
    search: ScaleSearch = "mse",
    importance: Tensor | None = None,
    is_gated: bool = False,
    name: str = "weight",
) -> QuantWeight:
    """weight [N, K] of any float dtype -> its tiles. Zero rows stay exactly zero.

    importance [K]: mean square of each input, float32; None = all alike. is_gated: the rows are
    [gate; up] and each half is padded by itself. Raises QuantizeError, naming `name`, for NaN or
    infinite weights and for an importance of another length.
    """
    check_finite(weight, name)
    if importance is not None and importance.shape != weight.shape[1:]:
        raise QuantizeError(
            f"{name}: importance of {tuple(importance.shape)} inputs, the weight has "
            f"{weight.shape[1]}; calibrate on the same model"
        )
    runs = [quantize_rows(run, fmt, search, importance) for run in _runs(weight)]
    return pack_rows(runs, fmt, weight.shape[1], is_gated)


def check_finite(weight: Tensor, name: str) -> None:
    """Raises QuantizeError with the name, the counts and the place of the first bad weight."""
    if bool(torch.isfinite(weight.sum(dtype=torch.float64))):
        return
    bad = ~torch.isfinite(weight)
    if not bool(bad.any()):
        return  # the sum overflowed, no weight is at fault
    row, column = (int(i) for i in bad.nonzero()[0])
    num_nan = int(weight.isnan().sum())
    raise QuantizeError(
        f"{name}: {num_nan} NaN and {int(bad.sum()) - num_nan} infinite of {weight.numel():,} "
        f"weights, the first at row {row}, column {column}; no format has codes for them, "
        "repair the checkpoint"
    )


def quantize_rows(
    weight: Tensor, fmt: WeightFormat, search: ScaleSearch, importance: Tensor | None
) -> Rows:
    """Rows [n, K] of any float dtype -> codes and scales; a mixed format picks per row."""
    grouped = _grouped(weight.float(), fmt.group_size)
    weights = None if importance is None else _grouped(importance[None], fmt.group_size)
    found = [_search(grouped, e, fmt.scale, search, weights) for e in fmt.elements]
    scales, formats = found[0][0], None
    if fmt.is_mixed:
        errors = torch.stack([error.sum(dim=1) for _, error in found])
        formats = errors.argmin(dim=0).to(torch.uint8)
        scales = torch.where(formats[:, None] == 0, found[0][0], found[1][0])
    scaled = grouped / scale_values(scales)[:, :, None]
    codes = encode(scaled, fmt.elements[0])
    if formats is not None:
        codes = torch.where(formats[:, None, None] == 0, codes, encode(scaled, fmt.elements[1]))
    return Rows(codes.flatten(1)[:, : weight.shape[1]], scales, formats)


def pack_rows(runs: list[Rows], fmt: WeightFormat, in_features: int, is_gated: bool) -> QuantWeight:
    """Join runs of rows and lay them out in tiles."""
    codes = torch.cat([run.codes for run in runs])
    halves = 2 if is_gated else 1
    tiles = [pack_tiles(half, fmt.bits) for half in codes.chunk(halves)]
    scales = [_by_block(half) for half in torch.cat([r.scales for r in runs]).chunk(halves)]
    formats = None
    if fmt.is_mixed:
        chosen = torch.cat([run.formats[:, None] for run in runs if run.formats is not None])
        formats = torch.cat([_by_block(half).squeeze(1) for half in chosen.chunk(halves)])
    return QuantWeight(
        torch.cat(tiles),
        torch.cat(scales),
        fmt.table(),
        formats,
        fmt.bits,
        fmt.group_size,
        in_features,
        codes.shape[0] // halves,
        is_gated,
    )


def _runs(weight: Tensor) -> Iterator[Tensor]:
    rows = max(1, _RUN_ELEMS // max(weight.shape[1], 1))
    yield from torch.split(weight, rows)


def _by_block(values: Tensor) -> Tensor:
    """[N, G] -> [R, G, 16], padded with zeros."""
    padded = F.pad(values, (0, 0, 0, -values.shape[0] % TILE_ROWS))
    return padded.view(-1, TILE_ROWS, values.shape[1]).transpose(1, 2).contiguous()


def _grouped(rows: Tensor, group_size: int) -> Tensor:
    """[n, K] -> [n, G, group], the last group padded with zeros."""
    if group_size == 0:
        return rows[:, None]
    padded = F.pad(rows, (0, -rows.shape[1] % group_size))
    return padded.view(rows.shape[0], -1, group_size)


def _search(
    grouped: Tensor,
    element: Element,
    kind: ScaleKind,
    search: ScaleSearch,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Stored scales [n, G] of the smallest error, and that error [n, G]."""
    base = grouped.abs().amax(dim=2) / element.max_value
    best = best_error = torch.empty(0)
    for stored in _candidates(base, element, kind, _POINTS[search]):
        error = _error(grouped, scale_values(stored), element, importance)
        if best.numel() == 0:
            best, best_error = stored, error
            continue
        is_better = error < best_error
        best = torch.where(is_better, stored, best)
        best_error = torch.where(is_better, error, best_error)
    return best, best_error


def _candidates(base: Tensor, element: Element, kind: ScaleKind, points: int) -> Iterator[Tensor]:
    """Stored scales to try, absmax's own first, so that ties keep it."""
    if kind == "e8m0":
        for shift in (0,) if points == 1 else (0, 1, -1):
            yield _to_e8m0(base * element.max_value, element, shift)
        return
    dtype = SCALE_DTYPES[kind]
    yield _stored(base, dtype)
    for i in range(points - 1):
        yield _stored(base * (_LOWEST + (_HIGHEST - _LOWEST) * i / (points - 2)), dtype)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` in its storage type, within its range; 1 for groups that are all zeros."""
    kept = scale.clamp(_SMALLEST[dtype], _LARGEST[dtype]).to(dtype)
    return torch.where(scale == 0, torch.ones_like(kept), kept)


def _to_e8m0(absmax: Tensor, element: Element, shift: int) -> Tensor:
    """Microscaling's exponent (OCP MX 1.0, section 6.3): that of absmax less the element's."""
    exponent = torch.frexp(absmax).exponent - torch.frexp(torch.tensor(element.max_value)).exponent
    stored = (exponent + 127 + shift).clamp(0, _MAX_E8M0).to(torch.uint8)
    return torch.where(absmax == 0, torch.full_like(stored, 127), stored)


def _error(grouped: Tensor, scale: Tensor, element: Element, importance: Tensor | None) -> Tensor:
    """Weighted squared error [n, G] of rounding to nearest with `scale` [n, G]."""
    scaled = grouped / scale[:, :, None]
    miss = to_grid(scaled, element).sub_(scaled)
    if importance is None:
        squares = torch.einsum("ngk,ngk->ng", miss, miss)
    else:
        squares = miss.square_().mul_(importance).sum(dim=2)
    return squares * scale.square()
