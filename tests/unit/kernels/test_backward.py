"""The backward formulas against PyTorch's own way through the references.

float64 must agree to its rounding: a wrong term cannot hide there. bfloat16 may differ by a few
roundings of intermediate gradients (2^-8 each) that the float32 reference does not make.
"""

from __future__ import annotations

import pytest
import torch

from sterna.kernels import attention_backward, gated, ops
from sterna.kernels.autograd import recompute
from sterna.kernels.backward import BACKWARDS
from sterna.kernels.load import load_kernels
from sterna.kernels.optable import OPS, define

define()
REFERENCES = {op.name: op.reference for op in OPS}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.5e-2}
H, G, C = 4, 2, 8
WIDTH = (H + 2 * G) * C


class Draw:
    """Seeded random tensors of one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(7)

    def __call__(self, *shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return values.to(self.dtype)


def starts(*borders: int) -> torch.Tensor:
    return torch.tensor(borders, dtype=torch.int32)


def table(num_rows: int = 64, rotary_dim: int = C) -> torch.Tensor:
    inv_freq = 1.0 / 100 ** (torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(num_rows)[:, None] * inv_freq
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def keys(*rows: range) -> tuple[torch.Tensor, torch.Tensor]:
    """(key_rows, key_starts) of sequences that see these ranges of rows."""
    parts = [torch.tensor([i for part in of for i in part]) for of in rows]
    lens = torch.tensor([0, *map(len, parts)])
    return torch.cat(parts).int(), lens.cumsum(0).int()


_PREFIX = range(5)
TREE = keys(
    (_PREFIX,), (_PREFIX, range(5, 8)), (_PREFIX, range(8, 9)), (_PREFIX, range(9, 15)),
    (_PREFIX, range(9, 15), range(15, 18)), (range(18, 23),),
)  # fmt: skip
CASES = {
    "linear": [
        lambda r: (r(7, 6), r(5, 6), r(5), r(7, 5), 5),
        lambda r: (r(7, 6), r(5, 6), None, None, 5),
    ],
    "gated_linear": [
        lambda r, kind=kind: (r(7, 6), r(10, 6), kind, 5)
        for kind in ("silu", "gelu", "gelu_tanh", "relu")
    ],
    "activate": [
        lambda r, kind=kind: (r(7, 6), kind) for kind in ("silu", "gelu", "gelu_tanh", "relu")
    ],
    "add": [lambda r: (r(7, 6), r(7, 6))],
    "select_rows": [lambda r: (r(7, 6), starts(5, 0, 5))],
    "embed": [
        lambda r, scale=scale: (starts(1, 1, 4), r(6, 5), 5, scale) for scale in (1.0, 2.0)
    ],
    "rms_norm": [
        lambda r, unit=unit: (r(7, 6), r(6), 1e-6, unit) for unit in (False, True)
    ],
    "rope": [
        lambda r: (r(5, WIDTH), starts(0, 1, 9, 3, 4), table(), None, None, 0.0, False, H, G, C),
        lambda r: (r(3, WIDTH), starts(0, 1, 9), table(64, 4), None, None, 0.0, False, H, G, C),
        lambda r: (r(3, WIDTH), starts(0, 1, 2), None, None, None, 0.0, False, H, G, C),
    ],
    # Tiles of 4 queries: documents of one token, of one tile, of several and a part of one.
    "attention": [
        lambda r, window=window, cap=cap: (
            r(27, WIDTH), starts(0, 1, 5, 27), H, G, C, 0.3, window, cap,
        )
        for window in (0, 1, 6)
        for cap in (0.0, 3.0)
    ],
    # A prefix of 5 with three continuations, one of which another continues; one alone.
    "shared_attention": [
        lambda r, window=window, cap=cap: (
            r(23, WIDTH), starts(0, 5, 8, 9, 15, 18, 23), *TREE, H, G, C, 0.3, window, cap,
        )
        for window in (0, 1, 6)
        for cap in (0.0, 3.0)
    ],
}  # fmt: skip
GRID = [(name, i) for name, cases in CASES.items() for i in range(len(cases))]


def wants_of(args) -> tuple[bool, ...]:
    return tuple(isinstance(a, torch.Tensor) and a.dtype != torch.int32 for a in args)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("name", "case"), GRID)
def test_formula_equals_the_reference(name, case, dtype, monkeypatch):
    monkeypatch.setattr(attention_backward, "TILE_ROWS", 4)
    args = CASES[name][case](Draw(dtype))
    wants = wants_of(args)
    if name == "rope":
        wants = (True, *(False,) * (len(args) - 1))  # its table is no parameter
    shape = REFERENCES[name](*args).shape
    grad = Draw(dtype)(*shape)
    expected = recompute(REFERENCES[name], grad, wants, [detached(a) for a in args])
    got = BACKWARDS[name](grad, wants, *args)
    assert got is not None
    for wanted, ours, theirs in zip(wants, got, expected, strict=True):
        if not wanted:
            continue
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        top = theirs.abs().max()
        assert (ours.double() - theirs.double()).abs().max() <= TOLERANCE[dtype] * top


def detached(value):
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def test_every_formula_is_in_the_grid():
    assert set(CASES) == set(BACKWARDS)


def test_tiles_stay_within_their_memory(monkeypatch):
    monkeypatch.setattr(attention_backward, "TILE_BYTES", 4 * 2 * 100 * 3)
    tiles = list(attention_backward._tiles(100, 2, 4))
    assert tiles[0] == (0, 3) and tiles[-1] == (99, 100)


def test_gradients_that_nobody_wants_are_not_computed():
    r = Draw(torch.float32)
    grads = BACKWARDS["linear"](
        r(7, 5), (True, False, False, False, False), r(7, 6), r(5, 6), None, None, 5
    )
    assert grads[1] is None and grads[0].shape == (7, 6)


# Widths that are whole vectors and not; rows below and above those that are packed.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize(("rows", "width"), [(3, 24), (40, 70)])
def test_kept_sums_change_no_bit_and_no_gradient(dtype, activation, rows, width):
    load_kernels()
    r, found = Draw(dtype), []
    x, weight, grad = r(rows, 32), r(2 * width, 32), r(rows, width)
    for op in (gated.gated_linear, ops.gated_linear):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = op(*leaves, activation, width)
        out.backward(grad)
        found.append((out.detach(), *(leaf.grad for leaf in leaves)))
    assert torch.equal(found[0][0], found[1][0])
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        error = (ours.double() - theirs.double()).abs().max()
        assert error <= TOLERANCE[dtype] * theirs.double().abs().max()
