"""The adapter ops on every instruction set of this machine: reference, invariance, gradient."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from sterna.kernels import lora_ops, lora_reference, reference
from sterna.kernels.lora import OneAdapter, lora_act, lora_add

from .test_cpu_kernels import DTYPES, backend, close  # noqa: F401 - a fixture

cpu_calls = pytest.importorskip("sterna.kernels.cpu_calls")
cpu_lora_calls = pytest.importorskip("sterna.kernels.cpu_lora_calls")
K = 76  # whole vectors and a tail
SIZES = (70, 20, 20)  # of the parts


@dataclass
class Adapters:
    """Three adapters of ranks 3, 8 and 13; the second leaves part 1 alone."""

    sizes: tuple[int, ...] = SIZES

    def __post_init__(self):
        torch.manual_seed(3)
        ranks = [3, 8, 13]
        self.a = [torch.randn(3, 13 * K) for _ in self.sizes]
        self.b = [torch.randn(3, 13 * n) for n in self.sizes]
        self.ranks = torch.tensor([ranks] * len(self.sizes), dtype=torch.int32)
        self.scales = torch.rand(len(self.sizes), 3) + 0.5
        self.scales[1, 1] = 0.0

    def starts(self):
        return [0, *torch.tensor(self.sizes).cumsum(0).tolist()]

    def args(self, slots):
        return slots, self.a, self.b, self.scales, self.ranks


def some_slots(rows: int):
    pattern = torch.tensor([1, 1, -1, 0, 2, 2, 2, 2, 2, 0, -1])
    return pattern.repeat(rows // len(pattern) + 1)[:rows].int()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 11, 150])
def test_lora(backend, dtype, rows):  # noqa: F811
    found, slots = Adapters(), some_slots(rows)
    x, y = torch.randn(rows, K).to(dtype), torch.randn(rows, sum(SIZES)).to(dtype)
    got, want = y.clone(), y.clone()
    cpu_lora_calls.lora(backend.eager, x, got, *found.args(slots), found.starts())
    lora_reference.lora(x, want, *found.args(slots), found.starts())
    close(got, want, "lora", dtype)
    assert torch.equal(got[slots < 0], y[slots < 0])
    untouched = slots == 1
    assert torch.equal(got[untouched, 70:90], y[untouched, 70:90])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_lora_gated(backend, dtype, activation):  # noqa: F811
    found, rows = Adapters((70, 70)), 40
    slots, x = some_slots(rows), torch.randn(rows, K).to(dtype)
    product = torch.randn(rows, 2 * 96)  # each half padded, as a packed weight's
    args = (*found.args(slots), activation, 70)
    got = cpu_lora_calls.lora_gated(backend.eager, x, product, *args)
    want = lora_reference.lora_gated(x, product, *args)
    close(got, want, "lora_gated", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_whatever_stands_beside_it(backend, dtype):  # noqa: F811
    found, rows = Adapters(), 150
    slots = some_slots(rows)
    x, y = torch.randn(rows, K).to(dtype), torch.randn(rows, sum(SIZES)).to(dtype)
    together = y.clone()
    cpu_lora_calls.lora(backend.eager, x, together, *found.args(slots), found.starts())
    for row in (0, 1, 3, 5, 77, 149):
        alone = y[row : row + 1].clone()
        args = found.args(slots[row : row + 1])
        cpu_lora_calls.lora(backend.eager, x[row : row + 1], alone, *args, found.starts())
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("is_packed", [False, True])
def test_rows_without_an_adapter_get_the_bits_of_gated_linear(
    backend,  # noqa: F811
    dtype,
    activation,
    rows,
    is_packed,
):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, K).to(dtype), (torch.randn(2 * 70, K) / 9).to(dtype)
    if is_packed:
        weight = backend.pack_weight(weight, gated=True)
    width = weight.shape[0] * (weight.shape[2] if is_packed else 1)
    product = cpu_calls.logits(backend.eager, x, weight, width)
    slots = torch.full((rows,), -1, dtype=torch.int32)
    args = (*Adapters((70, 70)).args(slots), activation, 70)
    got = cpu_lora_calls.lora_gated(backend.eager, x, product, *args)
    want = cpu_calls.gated_linear(backend.eager, x, weight, activation, 70)
    assert torch.equal(got, want)


def pairs(sizes, rank):
    """A and B in float64; the middle part, if there is one, has none."""
    torch.manual_seed(1)
    found = [(torch.randn(rank, K).double(), torch.randn(n, rank).double()) for n in sizes]
    if len(sizes) > 2:
        found[1] = None
    for pair in found:
        for tensor in pair or ():
            tensor.requires_grad_()
    return found


def test_gradients():
    x = torch.randn(6, K).double().requires_grad_()
    y = torch.randn(6, sum(SIZES)).double().requires_grad_()
    product = torch.randn(6, 2 * 16).double().requires_grad_()
    of_add, of_act = pairs(SIZES, 4), pairs((12, 12), 4)
    one = OneAdapter.of(of_add, [0.5, 1.0, 2.0], (0, 70, 90, 110))
    two = OneAdapter.of(of_act, [0.5, 2.0], (0, 12, 24))
    flat = [t for pair in (*of_add, *of_act) for t in pair or ()]

    def add_all(x, y, product, *_):
        return lora_add(x, y, of_add, one), lora_act(x, product, of_act, two, "silu")

    assert torch.autograd.gradcheck(add_all, (x, y, product, *flat), fast_mode=True)


def test_without_a_gradient_the_values_are_the_ops_own():
    weights = Adapters((70, 70))
    x, product = torch.randn(5, K), torch.randn(5, 140)
    pair = [(weights.a[p][0].view(13, K), weights.b[p][0].view(70, 13)) for p in range(2)]
    one = OneAdapter.of(pair, [1.5, 0.5], (0, 70, 140))
    with torch.no_grad():
        plain = lora_act(x, product, pair, one, "silu")
    leaf = x.clone().requires_grad_()
    assert torch.equal(lora_act(leaf, product, pair, one, "silu"), plain)
    a, b = one.tensors(pair)
    want = lora_reference.lora_gated(x, product, None, a, b, one.scales, one.ranks, "silu", 70)
    close(plain, want, "lora_gated", torch.float32)


def test_a_zero_b_changes_no_bit():
    x, y = torch.randn(9, K).bfloat16(), torch.randn(9, 70).bfloat16()
    pair = [(torch.randn(4, K), torch.zeros(70, 4))]
    one = OneAdapter.of(pair, [2.0], (0, 70))
    with torch.no_grad():
        assert torch.equal(lora_add(x, y.clone(), pair, one), y)


def test_the_wide_product_of_the_reference_is_that_of_gated_linear():
    x, weight = torch.randn(4, K), torch.randn(140, K)
    empty = [torch.zeros(1, 0)] * 2
    none = (torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int32))
    product = reference.logits(x, weight, 140)
    got = lora_reference.lora_gated(x, product, None, empty, empty, *none, "silu", 70)
    assert torch.equal(got, reference.gated_linear(x, weight, "silu", 70))
    assert lora_ops.lora_gated(x, product, None, empty, empty, *none, "silu", 70).shape == (4, 70)
