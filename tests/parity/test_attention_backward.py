"""The C++ gradient of attention against the float64 formula, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from sterna.kernels import attention_backward

_cpu = pytest.importorskip("sterna.kernels._cpu", reason="the CPU kernels are not built")
from sterna.kernels.cpu_backend import CpuBackend  # noqa: E402

# float32: sums of up to 150 products in another order. bfloat16: one rounding of the result.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-8}
# (heads, key heads, head_dim): plain, grouped, one key head, a width that is no multiple of 32.
SHAPES = [(2, 2, 32), (6, 2, 64), (4, 1, 80), (3, 1, 24)]
# Documents of one token, of part of a tile, of a whole one, of several with a rest.
STARTS = torch.tensor([0, 1, 20, 52, 202], dtype=torch.int32)


@pytest.fixture(params=_cpu.available_isas(), scope="module")
def backend(request) -> CpuBackend:
    return CpuBackend(2, request.param)


def inputs(shape, dtype):
    heads, kv_heads, dim = shape
    draw = torch.Generator().manual_seed(3)
    tokens = int(STARTS[-1])
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=draw, dtype=torch.float64)
    grad = torch.randn(tokens, heads * dim, generator=draw, dtype=torch.float64)
    return qkv.to(dtype), grad.to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (1, 0.0), (40, 0.0), (0, 2.0), (7, 2.0)])
def test_kernel_equals_the_formula(backend, shape, dtype, window, softcap):
    qkv, grad = inputs(shape, dtype)
    scale = shape[2] ** -0.5
    exact = attention_backward.reference(
        grad.double(), qkv.double(), STARTS, shape, scale, window, softcap
    )
    got = backend.attention_backward(grad, qkv, STARTS, shape, scale, window, softcap)
    assert got.dtype == dtype
    assert (got.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


def test_long_rows_keep_one_sum_a_key_head(backend, monkeypatch):
    """Above the memory bound the heads of a group share their sums, in the same order."""
    qkv, grad = inputs((6, 2, 64), torch.float32)
    apart = backend.attention_backward(grad, qkv, STARTS, (6, 2, 64), 0.125, 0, 0.0)
    monkeypatch.setattr("sterna.kernels.cpu_backend._PARTIAL_BYTES", 0)
    shared = backend.attention_backward(grad, qkv, STARTS, (6, 2, 64), 0.125, 0, 0.0)
    assert (apart - shared).abs().max() <= 1e-5 * apart.abs().max()


def test_a_document_does_not_depend_on_its_neighbours(backend):
    qkv, grad = inputs((6, 2, 64), torch.bfloat16)
    whole = backend.attention_backward(grad, qkv, STARTS, (6, 2, 64), 0.125, 0, 0.0)
    alone = backend.attention_backward(
        grad[20:52], qkv[20:52], torch.tensor([0, 32], dtype=torch.int32), (6, 2, 64), 0.125, 0, 0.0
    )
    assert torch.equal(whole[20:52], alone)


def test_float64_has_no_kernel(backend):
    qkv, grad = inputs((2, 2, 32), torch.float64)
    assert backend.attention_backward(grad, qkv, STARTS, (2, 2, 32), 0.2, 0, 0.0) is None
