"""The `quant_*` ops on the C++ kernels; see `cpu_calls.py` for sinks.

w stands for the flat weight of `quant_weight.py`: tiles, scales, table, row_formats, bits,
group_size, in_features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sterna.core.errors import KernelError
from sterna.kernels import _cpu
from sterna.kernels.cpu_calls import ACTIVATIONS, DTYPES, Call, Sink, address

SCALE_KINDS = {torch.float32: 0, torch.float16: 1, torch.uint8: 2}


def quant_linear(
    sink: Sink,
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    table: Tensor,
    row_formats: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    int8_activations: bool = False,
    activation: str = "none",
) -> Tensor:
    weight = (tiles, scales, table, row_formats, bits, group_size, in_features)
    act = ACTIVATIONS[activation]
    return _quant_linear(
        sink, x, weight, out_features, int8_activations, bias=bias, residual=residual, act=act
    )


def quant_gated_linear(
    sink: Sink,
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    table: Tensor,
    row_formats: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    activation: str,
    out_features: int,
    int8_activations: bool = False,
) -> Tensor:
    weight = (tiles, scales, table, row_formats, bits, group_size, in_features)
    gate = ACTIVATIONS[activation]
    return _quant_linear(sink, x, weight, out_features, int8_activations, gate=gate)


def quant_logits(
    sink: Sink,
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    table: Tensor,
    row_formats: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    vocab_size: int,
    softcap: float = 0.0,
    scale: float = 1.0,
    int8_activations: bool = False,
) -> Tensor:
    weight = (tiles, scales, table, row_formats, bits, group_size, in_features)
    return _quant_linear(
        sink, x, weight, vocab_size, int8_activations,
        out_dtype=torch.float32, softcap=softcap, scale=scale,
    )  # fmt: skip


_Weight = tuple[Tensor, Tensor, Tensor, Tensor | None, int, int, int]
_WeightArgs = tuple[int, int, int, int, int, int, int, int]


def _quant_linear(
    sink: Sink,
    x: Tensor,
    weight: _Weight,
    out_features: int,
    int8_activations: bool,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: int = 0,
    act: int = 0,
    out_dtype: torch.dtype | None = None,
    softcap: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    rows = x.shape[0]
    kind, unit, rows_in = sink.kind(x), 0.0, x
    out = sink.empty(rows, out_features, out_dtype or x.dtype, kind)
    if int8_activations:
        unit = int8_unit(weight[2])
        rows_in = quant_rows(sink, x)
    sink.kernels.quant_linear(
        sink.tape, *sink.counts(rows, 0), rows_in.data_ptr(), *_weight_args(weight), address(bias),
        address(residual), out.data_ptr(), kind, DTYPES[x.dtype], out_features, gate,
        act, int(out_dtype is not None), softcap, scale, unit,
    )  # fmt: skip
    return out


def quant_rows(sink: Sink, x: Tensor) -> Tensor:
    """x [T, K] -> uint8 [T, B]: rows in int8 with their scales and sums (QuantRowsArgs)."""
    rows, in_features = x.shape
    kind = sink.kind(x)
    out = sink.empty(rows, _cpu.int8_row_bytes(in_features), torch.uint8, kind)
    sink.kernels.quant_rows(
        sink.tape, *sink.counts(rows, 0), x.data_ptr(), out.data_ptr(), kind, DTYPES[x.dtype],
        in_features,
    )  # fmt: skip
    return out


def int8_unit(table: Tensor) -> float:
    """What every value of the table is a whole number of.

    Raises KernelError when the values need more than two int8 planes (e4m3).
    """
    unit = _cpu.int8_unit(table.data_ptr(), table.numel())
    if unit == 0.0:
        raise KernelError(
            "int8 activations need weights that are small whole numbers (every format but fp8); "
            "use the default activations"
        )
    return unit


def quant_embed(
    sink: Sink,
    tokens: Tensor,
    tiles: Tensor,
    scales: Tensor,
    table: Tensor,
    row_formats: Tensor | None,
    bits: int,
    group_size: int,
    hidden_size: int,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    weight = (tiles, scales, table, row_formats, bits, group_size, hidden_size)
    kind = sink.kind(tokens)
    out = sink.empty(tokens.shape[0], hidden_size, dtype, kind)
    sink.kernels.quant_embed(
        sink.tape, *sink.counts(tokens.shape[0], 0), tokens.data_ptr(), *_weight_args(weight),
        out.data_ptr(), kind, DTYPES[dtype], scale,
    )  # fmt: skip
    return out


def _weight_args(weight: _Weight) -> _WeightArgs:
    tiles, scales, table, row_formats, bits, group_size, in_features = weight
    pointers = (tiles.data_ptr(), scales.data_ptr(), table.data_ptr(), address(row_formats))
    return (*pointers, bits, group_size, SCALE_KINDS[scales.dtype], in_features)


QUANT_CALLS: dict[str, Call] = {
    "quant_linear": quant_linear,
    "quant_gated_linear": quant_gated_linear,
    "quant_logits": quant_logits,
    "quant_embed": quant_embed,
}
