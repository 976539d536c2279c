"""Scales and codes: nearest for the stored scale, searches that never lose, and bad weights."""

from __future__ import annotations

import pytest
import torch

from sterna.core.errors import QuantizeError
from sterna.kernels.quant_weight import per_weight, scale_values
from sterna.quant.formats import FORMATS, parse_format
from sterna.quant.rtn import quantize_weight

NAMES = [*FORMATS, "fp6-g128", "fp6-mixed-g64", "int4-g32", "int5-g64", "nf6-g128"]


def gauss(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02


def error(weight: torch.Tensor, quantised: torch.Tensor) -> torch.Tensor:
    return (weight - quantised).double().square()


def snr_db(weight: torch.Tensor, quantised: torch.Tensor) -> float:
    return float(10 * torch.log10(weight.double().square().sum() / error(weight, quantised).sum()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("search", ["absmax", "fast"])
def test_codes_are_the_nearest_for_the_stored_scale(name, search):
    """Brute force: no other value of the table times the stored scale lies nearer."""
    fmt, weight = parse_format(name), gauss(19, 150)
    q = quantize_weight(weight, fmt, search=search)
    scales = per_weight(scale_values(q.scales), fmt.group_size, 150)[:19].expand(19, 150)
    chosen = torch.zeros(19, 1) if q.row_formats is None else q.row_formats.view(-1)[:19, None]
    grids = q.table.sort(dim=1).values
    for i in range(grids.shape[0]):
        possible = grids[i, 1:] if fmt.elements[i].name.startswith("int") else grids[i]
        nearest = (weight[..., None] - possible * scales[..., None]).abs().amin(dim=2)
        rows = (chosen == i).squeeze(1)
        got = (weight - q.dequantize()).abs()[rows]
        # the quotient w / scale is rounded once, so a near tie may go either way
        assert (got <= nearest[rows] + weight.abs()[rows] * 2**-22).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_search_never_loses_to_a_smaller_one(name):
    fmt, weight = parse_format(name), gauss(32, 256)
    errors = [
        error(weight, quantize_weight(weight, fmt, search=search).dequantize()).sum(dim=1)
        for search in ("absmax", "mse")
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()


# Gaussian rows of 1,536 by absmax, measured independently (reference table of the design), +-0.3
@pytest.mark.parametrize(
    ("name", "decibels"),
    [("fp6", 31.0), ("fp6-e3m2", 25.6), ("fp6-g128", 32.2 - 0.6), ("mxfp6", 30.9)],
)
def test_signal_to_noise_is_that_of_the_format(name, decibels):
    weight = gauss(64, 1536)
    q = quantize_weight(weight, parse_format(name), search="absmax")
    assert snr_db(weight, q.dequantize()) == pytest.approx(decibels, abs=0.3)


def test_mixed_rows_take_the_better_element():
    weight = gauss(32, 576)
    weight[::2, 0] = 2.0  # an outlier of 100 sigma: more exponents pay
    q = quantize_weight(weight, parse_format("fp6-mixed"), search="mse")
    assert q.row_formats is not None
    assert torch.equal(q.row_formats.view(-1), torch.tensor([1, 0] * 16, dtype=torch.uint8))
    rows = error(weight, q.dequantize()).sum(dim=1)
    for other in ("fp6", "fp6-e3m2"):
        alone = quantize_weight(weight, parse_format(other), search="mse").dequantize()
        assert (rows <= error(weight, alone).sum(dim=1) * (1 + 1e-6)).all()


def test_importance_moves_the_error_to_inputs_that_do_not_matter():
    weight, importance = gauss(64, 256), torch.ones(256)
    importance[:16] = 1000.0
    fmt = parse_format("int4")
    plain = error(weight, quantize_weight(weight, fmt).dequantize())
    aware = error(weight, quantize_weight(weight, fmt, importance=importance).dequantize())
    assert (aware * importance).sum() < 0.8 * (plain * importance).sum()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (17, 65), (16, 64), (33, 129)])
def test_any_shape_and_zero_rows(name, shape):
    weight = gauss(*shape)
    weight[shape[0] // 2] = 0
    weight[-1, : shape[1] // 2] = 0
    q = quantize_weight(weight, parse_format(name))
    values = q.dequantize()
    assert values.shape == weight.shape
    is_zero = weight == 0
    if not parse_format(name).elements[0].has_zero:  # only whole groups are exact
        is_zero = (weight == 0).all(dim=1)
    assert bool((values[is_zero] == 0).all())
    assert bool(torch.isfinite(values).all())
    assert bool(torch.isfinite(scale_values(q.scales)).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e4, 1e30])
def test_very_small_and_very_large_weights_stay_finite(name, size):
    fmt = parse_format(name)
    weight = gauss(16, 64) / 0.02 * size
    q = quantize_weight(weight, fmt)
    values = q.dequantize()
    assert bool(torch.isfinite(values).all())
    # float16 scales end at 65504 and 2^-24: beyond them the largest or smallest scale is taken
    if fmt.scale != "float16":
        assert snr_db(weight / size, values / size) > 10


def test_gated_halves_are_padded_apart():
    weight = gauss(10, 64)
    q = quantize_weight(weight, parse_format("fp6-mixed"), is_gated=True)
    assert (q.tiles.shape[0], q.out_features) == (2, 5)
    plain = quantize_weight(weight, parse_format("fp6-mixed"))
    assert torch.equal(q.dequantize(), plain.dequantize())


def test_bfloat16_weights_are_taken_exactly():
    weight = gauss(16, 64).bfloat16()
    ours = quantize_weight(weight, parse_format("fp6"))
    assert torch.equal(ours.dequantize(), quantize_weight(weight.float(), parse_format("fp6"))
                       .dequantize())  # fmt: skip


def test_a_scale_is_rounded_before_the_codes():
    """float16 scales: the codes are nearest for the rounded scale, so storing loses nothing."""
    weight = gauss(16, 64)
    q = quantize_weight(weight, parse_format("fp6", "float16"), search="absmax")
    assert q.scales.dtype == torch.float16
    exact = weight.abs().amax(dim=1) / 7.5
    assert torch.equal(q.scales[0, 0], exact.half())


@pytest.mark.parametrize(
    ("bad", "said"),
    [(float("nan"), "1 NaN and 0 infinite"), (float("-inf"), "0 NaN and 1 infinite")],
)
def test_bad_weights_are_refused_by_name_and_place(bad, said):
    weight = gauss(4, 8)
    weight[2, 5] = bad
    with pytest.raises(QuantizeError, match=rf"layers.0.mlp.down: {said}.*row 2, column 5"):
        quantize_weight(weight, parse_format("fp6"), name="layers.0.mlp.down")


def test_an_importance_of_another_length_is_refused():
    with pytest.raises(QuantizeError, match=r"weight: importance of \(7,\) inputs"):
        quantize_weight(gauss(4, 8), parse_format("fp6"), importance=torch.ones(7))
