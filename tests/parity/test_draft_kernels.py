"""A speculator's own kernels against the reference, on every instruction set of this machine.

Widths below, at and beside whole vectors; a vocabulary with a tail; rows that are not finite.
"""

from __future__ import annotations

import pytest
import torch

from sterna.kernels import reference

from .test_cpu_kernels import DTYPES, backend, close  # noqa: F401 - a fixture

cpu_draft_calls = pytest.importorskip("sterna.kernels.cpu_draft_calls")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 64, 100])
@pytest.mark.parametrize("case", ["mlp", "lstm, first draft", "lstm"])
def test_draft_cell(backend, dtype, width, case):  # noqa: F811
    torch.manual_seed(0)
    is_lstm = case != "mlp"
    z = torch.randn(7, width * (4 if is_lstm else 1)).to(dtype)
    cell = torch.randn(7, width).to(dtype) if case == "lstm" else None
    norms = [torch.randn(width).to(dtype) for _ in range(4)]
    args = (z, cell, *norms[:2], *(norms[2:] if is_lstm else (None, None)), 1e-6)
    got = cpu_draft_calls.draft_cell(backend.eager, *args)
    want = reference.draft_cell(*args)
    assert got.shape == want.shape == (14 if is_lstm else 7, width)
    close(got, want, "draft_cell", dtype)


@pytest.mark.parametrize("ids", [None, torch.arange(101, dtype=torch.int32) * 3])
def test_pick(backend, ids):  # noqa: F811
    torch.manual_seed(1)
    logits = torch.randn(6, 101) * 3
    logits[1, 40] = logits[1, 60] = 20  # the first of equals
    logits[2, 100] = 30  # in the tail
    logits[3, 7] = float("nan")
    logits[4, 5] = float("inf")
    logits[5] = -float("inf")
    got = cpu_draft_calls.pick(backend.eager, logits, ids)
    want = reference.pick(logits, ids)
    times = 1 if ids is None else 3
    assert got[0].tolist() == want[0].tolist()
    assert got[0, 1:].tolist() == [40 * times, 100 * times, 0, 0, 0]
    close(got[1].view(torch.float32), want[1].view(torch.float32), "pick", torch.float32)
    assert got[1, 3:].tolist() == [0, 0, 0]
