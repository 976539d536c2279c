"""The calls of a learned speculator's own ops; see cpu_calls.py."""

from __future__ import annotations

import torch
from torch import Tensor

from sterna.kernels.cpu_calls import DTYPES, Call, Sink, address


def draft_cell(
    sink: Sink,
    z: Tensor,
    cell: Tensor | None,
    norm: Tensor,
    norm_bias: Tensor,
    cell_norm: Tensor | None,
    cell_norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    rows, hidden = z.shape[0], norm.shape[0]
    kind = sink.kind(z)
    out = sink.empty(rows if cell_norm is None else 2 * rows, hidden, z.dtype, kind)
    cell_out = 0 if cell_norm is None else out[rows:].data_ptr()
    sink.kernels.draft_cell(
        sink.tape, *sink.counts(rows, 0), z.data_ptr(), address(cell), norm.data_ptr(),
        norm_bias.data_ptr(), address(cell_norm), address(cell_norm_bias), out.data_ptr(),
        cell_out, kind, DTYPES[z.dtype], hidden, eps,
    )  # fmt: skip
    return out


def pick(sink: Sink, logits: Tensor, ids: Tensor | None) -> Tensor:
    rows, vocab = logits.shape
    kind = sink.kind(logits)
    out = sink.empty(2, rows, torch.int32, kind)
    sink.kernels.pick(
        sink.tape, *sink.counts(rows, 0), logits.data_ptr(), address(ids), out.data_ptr(),
        out[1:].data_ptr(), kind, vocab,
    )  # fmt: skip
    return out


DRAFT_CALLS: dict[str, Call] = {"draft_cell": draft_cell, "pick": pick}
