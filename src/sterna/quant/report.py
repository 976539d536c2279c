"""What quantisation did to each weight, in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sterna.kernels.quant_weight import QuantWeight
from sterna.kernels.tiles import TILE_ROWS
from sterna.quant.threads import map_runs

_RUN_BLOCKS = 16  # row blocks decoded at a time: 256 rows


@dataclass(frozen=True, slots=True)
class WeightReport:
    """One weight. Errors are norms relative to the norm of what was there.

    weight_error: |w - q| / |w|. output_error: the same of the layer's output, as predicted from
    the mean squares of its inputs, or by their Hessian; None without calibration.
    """

    name: str
    format: str
    rows: int
    in_features: int
    nbytes: int
    weight_error: float
    output_error: float | None

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise of the weights, in decibels; inf when exact."""
        return -20 * math.log10(self.weight_error) if self.weight_error else math.inf

    @property
    def bits_per_weight(self) -> float:
        """Codes, scales, row formats and padding."""
        return 8 * self.nbytes / (self.rows * self.in_features)


@dataclass(frozen=True, slots=True)
class ModelReport:
    """A whole model. num_bytes: the file, header and unquantised tensors included."""

    format: str
    weights: tuple[WeightReport, ...]
    num_bytes: int
    num_parameters: int
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        """All bytes of the file over all parameters of the model."""
        return 8 * self.num_bytes / self.num_parameters


def weight_report(
    name: str,
    format_name: str,
    plain: Sequence[Tensor],
    quantised: QuantWeight,
    importance: Tensor | None,
) -> WeightReport:
    """plain: the weight [N, K], or its halves when gated. Decoded in runs: little memory.

    importance: mean squares of the inputs [K], or their Hessian [K, K].
    """
    runs = _runs(plain, quantised)
    h = torch.ones(quantised.in_features) if importance is None else importance
    sums = torch.stack(map_runs(lambda run: _square_sums(*run, h), runs)).sum(dim=0)
    errors = [float((sums[i] / sums[i + 1]).sqrt()) if sums[i + 1] > 0 else 0.0 for i in (0, 2)]
    return WeightReport(
        name,
        format_name,
        sum(len(weight) for weight in plain),
        quantised.in_features,
        quantised.nbytes,
        errors[0],
        None if importance is None else errors[1],
    )


def row_errors(
    plain: Sequence[Tensor], quantised: QuantWeight, importance: Tensor | None
) -> Tensor:
    """float32 [N]: every row's squared error, times importance [K] if given; decoded in runs."""

    def errors(run: _Run) -> Tensor:
        miss, _ = _miss(*run)
        squares = miss.square_()
        return squares.sum(dim=1) if importance is None else squares @ importance

    return torch.cat(map_runs(errors, _runs(plain, quantised)))


_Run = tuple[QuantWeight, Tensor, int]


def _runs(plain: Sequence[Tensor], quantised: QuantWeight) -> list[_Run]:
    """(half, plain half, first row block), in the order of the rows."""
    halves = _halves(quantised) if quantised.is_gated else [quantised]
    return [
        (half, weight, first)
        for half, weight in zip(halves, plain, strict=True)
        for first in range(0, half.tiles.shape[0], _RUN_BLOCKS)
    ]


def _miss(half: QuantWeight, weight: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """(q - w, w) of a run of row blocks."""
    w = weight[first * TILE_ROWS : (first + _RUN_BLOCKS) * TILE_ROWS].float()
    return _block_rows(half, first, first + _RUN_BLOCKS)[: len(w)] - w, w


def _square_sums(half: QuantWeight, weight: Tensor, first: int, importance: Tensor) -> Tensor:
    """float64 |w - q|^2, |w|^2 and both times importance, over a run of row blocks."""
    miss, w = _miss(half, weight, first)
    by_input = torch.stack([miss.square().sum(dim=0), w.square().sum(dim=0)]).double()
    if importance.dim() == 1:
        return torch.cat([by_input.sum(dim=1), (by_input * importance).sum(dim=1)])
    outputs = [(x @ importance * x).sum(dtype=torch.float64) for x in (miss, w)]
    return torch.cat([by_input.sum(dim=1), torch.stack(outputs)])


def _halves(weight: QuantWeight) -> list[QuantWeight]:
    """The gate and up parts of a gated weight."""
    tiles, scales = weight.tiles.chunk(2), weight.scales.chunk(2)
    formats = (None, None) if weight.row_formats is None else weight.row_formats.chunk(2)
    return [
        QuantWeight(
            tiles[i],
            scales[i],
            weight.table,
            formats[i],
            weight.bits,
            weight.group_size,
            weight.in_features,
            weight.out_features,
        )
        for i in range(2)
    ]


def _block_rows(weight: QuantWeight, first: int, stop: int) -> Tensor:
    """float32 rows of row blocks [first, stop)."""
    formats = weight.row_formats
    part = QuantWeight(
        weight.tiles[first:stop],
        weight.scales[first:stop],
        weight.table,
        None if formats is None else formats[first:stop],
        weight.bits,
        weight.group_size,
        weight.in_features,
        weight.out_features,
    )
    return part.dequantize()
