"""The quantised ops against dequantised weights through the plain ops, over widths and scales."""

from __future__ import annotations

import pytest
import torch

from sterna.kernels import ops, reference
from sterna.kernels.quant_weight import QuantWeight, scale_values
from sterna.kernels.tiles import TILE_ROWS, pack_tiles, tile_grid

# bits x (group, scale dtype, mixed rows): each bit layout with each kind of scale once
KINDS = [
    (6, 0, torch.float32, False),
    (6, 0, torch.float16, True),
    (6, 32, torch.uint8, False),
    (4, 32, torch.float16, False),
    (5, 128, torch.float32, False),
    (8, 64, torch.float16, True),
]


def weight(bits, group, dtype, is_mixed, rows=40, k=200, is_gated=False, seed=0) -> QuantWeight:
    g = torch.Generator().manual_seed(seed)
    halves = 2 if is_gated else 1
    blocks, _ = tile_grid(rows, k)
    groups = -(-k // group) if group else 1
    codes = torch.randint(0, 1 << bits, (halves, rows, k), generator=g, dtype=torch.uint8)
    tiles = torch.cat([pack_tiles(half, bits) for half in codes])
    scales = torch.rand(halves * blocks, groups, TILE_ROWS, generator=g) + 0.5
    if dtype == torch.uint8:
        scales = torch.randint(120, 134, scales.shape, generator=g)
    table = torch.randn(2 if is_mixed else 1, 1 << bits, generator=g).bfloat16().float()
    formats = torch.randint(0, 2, (halves * blocks, TILE_ROWS), generator=g, dtype=torch.uint8)
    return QuantWeight(tiles, scales.to(dtype), table, formats if is_mixed else None, bits, group,
                       k, rows, is_gated)  # fmt: skip


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_is_table_times_scale(kind):
    """Against a loop over rows and groups; products are formed in float32."""
    w = weight(*kind)
    values = w.dequantize()
    assert values.shape == (40, 200)
    plain = QuantWeight(w.tiles, torch.ones_like(scale_values(w.scales)), w.table, w.row_formats,
                        w.bits, w.group_size, 200, 40).dequantize()  # fmt: skip
    scales = scale_values(w.scales)
    size = w.group_size or 200
    for row in range(40):
        for start in range(0, 200, size):
            scale = scales[row // 16, start // size, row % 16]
            span = slice(start, start + size)
            assert torch.equal(values[row, span], plain[row, span] * scale)


def test_row_formats_choose_the_table_row():
    w = weight(6, 0, torch.float32, True)
    first = QuantWeight(w.tiles, w.scales, w.table[:1], None, 6, 0, 200, 40).dequantize()
    second = QuantWeight(w.tiles, w.scales, w.table[1:], None, 6, 0, 200, 40).dequantize()
    is_second = w.row_formats.view(-1)[:40, None].bool()
    assert torch.equal(w.dequantize(), torch.where(is_second, second, first))


@pytest.mark.parametrize("exponent", [0, 1, 127, 254])
def test_e8m0_scales_are_powers_of_two(exponent):
    stored = torch.tensor([exponent], dtype=torch.uint8)
    assert float(scale_values(stored)) == 2.0 ** (exponent - 127)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_equal_the_plain_ones_on_dequantised_weights(kind, dtype):
    x, w = rand(5, 200, dtype=dtype), weight(*kind)
    plain = w.dequantize()
    bias, residual = rand(40, dtype=dtype), rand(5, 40, dtype=dtype)
    # the reference itself, not a fast `linear`: dequantised weights are no bfloat16
    expected = reference.linear(x, plain, bias, residual, 40)
    assert close(ops.quant_linear(x, *w.flat(), bias, residual, 40), expected, "linear")
    gated = weight(*kind, is_gated=True)
    expected = reference.gated_linear(x, gated.dequantize(), "silu", 40)
    assert close(ops.quant_gated_linear(x, *gated.flat(), "silu", 40), expected, "gated_linear")
    expected = reference.logits(x, plain, 40, 5.0, 0.3)
    got = ops.quant_logits(x, *w.flat(), 40, 5.0, 0.3)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() <= 5e-5 * expected.abs().max()
    tokens = torch.tensor([3, 39, 3, 0], dtype=torch.int32)
    got = ops.quant_embed(tokens, *w.flat(), 1.5, dtype)
    assert torch.equal(got, (plain[tokens.long()] * 1.5).to(dtype))


def close(got, expected, name) -> bool:
    from sterna.kernels.optable import OPS

    tolerance = next(op.tolerance for op in OPS if op.name == name)[got.dtype]
    assert got.dtype == expected.dtype
    return bool((got.float() - expected.float()).abs().max() <= tolerance * expected.abs().max())


def test_a_gated_weight_pads_each_half():
    w = weight(6, 0, torch.float32, False, rows=5, is_gated=True)
    assert w.tiles.shape[0] == 2
    values = w.dequantize()
    assert values.shape == (10, 200)
    halves = [QuantWeight(w.tiles[i : i + 1], w.scales[i : i + 1], w.table, None, 6, 0, 200, 5)
              for i in range(2)]  # fmt: skip
    assert torch.equal(values, torch.cat([half.dequantize() for half in halves]))


def test_nbytes_counts_padding_scales_and_row_formats():
    w = weight(6, 32, torch.float16, True, rows=17, k=65)
    assert w.nbytes == 2 * 2 * 768 + 2 * 3 * 16 * 2 + 2 * 16
