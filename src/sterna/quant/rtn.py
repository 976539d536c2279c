"""Round to nearest: scales, then codes. Every other quantiser starts from these scales.

A scale is rounded to the type it is stored in before any code is computed, so the codes are the
nearest ones for the scale that the kernels will read. Searched scales minimise

    sum over k of importance[k] * (w[k] - scale * q(w[k] / scale))^2

in each row (or group) over a grid of multiples of absmax / (largest code value). importance is 1,
or the mean square of the layer's input k (the diagonal of GPTQ's Hessian; AWQ's observation that
input channels differ). Multiples above 1 help floating formats, whose step depends on where in a
binade the large weights fall; below 1 they clip, which helps integers.

Weights are walked in runs of row blocks of about a megabyte, one run a thread (`threads.py`): on
135M weights and 2 cores the fast search takes 1.5 s, the full one 4 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sterna.core.errors import QuantizeError
from sterna.core.machine import num_usable_cpus
from sterna.kernels.quant_weight import QuantWeight, scale_values
from sterna.kernels.tiles import TILE_ROWS, pack_tiles
from sterna.quant.formats import (
    SCALE_DTYPES,
    Element,
    ScaleKind,
    WeightFormat,
    encode,
    round_to_grid_,
)
from sterna.quant.threads import map_runs

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

    def slice(self, first: int, stop: int) -> Rows:
        """Rows [first, stop)."""
        formats = None if self.formats is None else self.formats[first:stop]
        return Rows(self.codes[first:stop], self.scales[first:stop], formats)


@dataclass(frozen=True, slots=True)
class TiledRows:
    """The same in the layout of QuantWeight: tiles [R, K64, ...], scales [R, G, 16]."""

    tiles: Tensor
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
    halves = weight.chunk(2) if is_gated else (weight,)
    runs = [run for half in halves for run in _runs(half)]
    parts = map_runs(lambda run: tile_rows(quantize_rows(run, fmt, search, importance), fmt), runs)
    return _joined(parts, fmt, weight.shape[1], halves[0].shape[0], is_gated)


def check_finite(weight: Tensor, name: str) -> None:
    """Raises QuantizeError with the name, the counts and the place of the first bad weight."""
    # A sum is not finite when a summand is not; by runs, for it converts what it is given.
    sums = map_runs(lambda run: run.sum(dtype=torch.float64), _runs(weight))
    if bool(torch.isfinite(torch.stack(sums)).all()):
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
    if weights is None and grouped.shape[1] * grouped.shape[2] > weight.shape[1]:
        # the zeros that fill the last group have no error, also where zero is no value
        weights = _grouped(torch.ones(1, weight.shape[1]), fmt.group_size)
    found = [_search(grouped, e, fmt.scale, search, weights) for e in fmt.elements]
    scales, formats = found[0][0], None
    if fmt.is_mixed:
        errors = torch.stack([error.sum(dim=1) for _, error in found])
        formats = errors.argmin(dim=0).to(torch.uint8)
        scales = torch.where(formats[:, None] == 0, found[0][0], found[1][0])
    scaled = grouped / divisors(scale_values(scales))[:, :, None]
    codes = encode(scaled, fmt.elements[0])
    if formats is not None:
        codes = torch.where(formats[:, None, None] == 0, codes, encode(scaled, fmt.elements[1]))
    return Rows(codes.flatten(1)[:, : weight.shape[1]], scales, formats)


def pack_rows(rows: Rows, fmt: WeightFormat, is_gated: bool) -> QuantWeight:
    """Lay rows out in tiles; [gate; up] when gated."""
    num_rows, in_features = rows.codes.shape
    size = num_rows // (1 + is_gated)
    parts = [tile_rows(rows.slice(i, i + size), fmt) for i in range(0, num_rows, size)]
    return _joined(parts, fmt, in_features, size, is_gated)


def tile_rows(rows: Rows, fmt: WeightFormat) -> TiledRows:
    """Whole row blocks of some rows, padded with zeros."""
    formats = None if rows.formats is None else _by_block(rows.formats[:, None]).squeeze(1)
    return TiledRows(pack_tiles(rows.codes, fmt.bits), _by_block(rows.scales), formats)


def _joined(
    parts: list[TiledRows], fmt: WeightFormat, in_features: int, out_features: int, is_gated: bool
) -> QuantWeight:
    formats = [part.formats for part in parts if part.formats is not None]
    return QuantWeight(
        torch.cat([part.tiles for part in parts]),
        torch.cat([part.scales for part in parts]),
        fmt.table(),
        torch.cat(formats) if formats else None,
        fmt.bits,
        fmt.group_size,
        in_features,
        out_features,
        is_gated,
    )


def _runs(weight: Tensor) -> tuple[Tensor, ...]:
    """Runs of whole row blocks, as even as they come, in a multiple of the CPUs' number."""
    rounds = -(-weight.numel() // (_RUN_ELEMS * num_usable_cpus()))
    blocks = -(-weight.shape[0] // TILE_ROWS)
    per_run = max(1, -(-blocks // (rounds * num_usable_cpus())))
    return torch.split(weight, per_run * TILE_ROWS)


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
    scratch = torch.empty_like(grouped), torch.empty_like(grouped)
    best = best_error = torch.empty(0)
    for stored in _candidates(base, element, kind, _POINTS[search]):
        error = _error(grouped, scale_values(stored), element, importance, scratch)
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
    of_zeros = 1.0 if element.has_zero else 0.0
    yield _stored(base, dtype, of_zeros)
    for i in range(points - 1):
        factor = _LOWEST + (_HIGHEST - _LOWEST) * i / (points - 2)
        yield _stored(base * factor, dtype, of_zeros)


def _stored(scale: Tensor, dtype: torch.dtype, of_zeros: float) -> Tensor:
    """`scale` in its storage type, within its range; `of_zeros` for groups that are all zeros."""
    kept = scale.clamp(_SMALLEST[dtype], _LARGEST[dtype]).to(dtype)
    return torch.where(scale == 0, torch.full_like(kept, of_zeros), kept)


def divisors(scales: Tensor) -> Tensor:
    """float32 scales to divide by: 1 for that of zero, whose codes do not matter."""
    return torch.where(scales == 0, 1.0, scales)


def _to_e8m0(absmax: Tensor, element: Element, shift: int) -> Tensor:
    """Microscaling's exponent (OCP MX 1.0, section 6.3): that of absmax less the element's."""
    exponent = torch.frexp(absmax).exponent - torch.frexp(torch.tensor(element.max_value)).exponent
    stored = (exponent + 127 + shift).clamp(0, _MAX_E8M0).to(torch.uint8)
    return torch.where(absmax == 0, torch.full_like(stored, 127), stored)


def _error(
    grouped: Tensor,
    scale: Tensor,
    element: Element,
    importance: Tensor | None,
    scratch: tuple[Tensor, Tensor],
) -> Tensor:
    """Weighted squared error [n, G] of rounding to nearest with `scale` [n, G].

    Nothing of the run's size is allocated: that would cost page faults in every thread.
    """
    rounded, spare = scratch
    torch.div(grouped, divisors(scale)[:, :, None], out=rounded)
    round_to_grid_(rounded, spare, element)
    miss = torch.addcmul(grouped, rounded, scale[:, :, None], value=-1, out=spare)
    squares = miss.square_() if importance is None else miss.square_().mul_(importance)
    return squares.sum(dim=2)
