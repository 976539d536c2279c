"""Every code of every element, and rounding checked against exact arithmetic on the value list."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from sterna.core.errors import ConfigError
from sterna.kernels.quant_weight import QuantWeight, per_weight, scale_values
from sterna.quant.formats import (
    ELEMENTS,
    FORMATS,
    decode,
    encode,
    parse_format,
    round_to_grid,
)
from sterna.quant.rtn import quantize_weight

MAXIMA = {"e2m3": 7.5, "e3m2": 28, "e2m2": 7, "e2m1": 6, "e4m3": 448,
          "int4": 7, "int5": 15, "int6": 31, "int8": 127,
          "nf6": 127, "nf5": 127, "nf4": 127}  # fmt: skip


def written_codes(name: str) -> list[int]:
    """Codes an encoder may write: without the most negative integer, without e4m3's NaNs."""
    element = ELEMENTS[name]
    unused = {0x7F, 0xFF} if name == "e4m3" else set()
    if name.startswith("int"):
        unused = {1 << (element.bits - 1)}
    return [code for code in range(1 << element.bits) if code not in unused]


def nearest_even(x: float, name: str) -> int:
    """The code of the value nearest to x, by fractions; a tie goes to the even code."""
    values = ELEMENTS[name].values
    exact = Fraction(x)
    codes = [c for c in written_codes(name) if math.copysign(1, values[c]) == math.copysign(1, x)]
    if name.startswith("int"):
        codes = written_codes(name)
    return min(codes, key=lambda c: (abs(Fraction(values[c]) - exact), c & 1))


def test_the_table_holds_the_papers_and_the_microscaling_elements():
    assert {name: e.max_value for name, e in ELEMENTS.items()} == MAXIMA
    assert ELEMENTS["e3m2"].values[:9] == (0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375,
                                           0.5)  # fmt: skip
    assert ELEMENTS["e2m3"].values[:10] == tuple(i / 8 for i in range(10))
    assert [ELEMENTS["e2m1"].values[c] for c in range(8)] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert ELEMENTS["e4m3"].values[0x7F] == 448
    assert ELEMENTS["e4m3"].values[0xFF] == -448
    assert ELEMENTS["int4"].values[8] == -8


def test_e4m3_agrees_with_torchs():
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(torch.float8_e4m3fn).float()
    ours = decode(codes, ELEMENTS["e4m3"])
    assert torch.equal(ours[~theirs.isnan()], theirs[~theirs.isnan()])


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_code_survives_decode_and_encode(name):
    codes = torch.tensor(written_codes(name), dtype=torch.uint8)
    values = decode(codes, ELEMENTS[name])
    assert torch.equal(values.bfloat16().float(), values), "a value is not exact in bfloat16"
    assert torch.equal(encode(values, ELEMENTS[name]), codes)
    assert torch.equal(round_to_grid(values, ELEMENTS[name]), values)


@pytest.mark.parametrize("name", ELEMENTS)
def test_rounding_is_to_nearest_even_and_saturates(name):
    """All midpoints of neighbours, a float32 step to both sides, and what lies outside."""
    element = ELEMENTS[name]
    grid = torch.tensor(sorted(set(decode_all(name))), dtype=torch.float32)
    middle = (grid[1:] + grid[:-1]) / 2
    below, above = torch.nextafter(middle, grid[:-1]), torch.nextafter(middle, grid[1:])
    outside = torch.tensor([1.0, 1.001, 1.5, 1e30]) * element.max_value
    tiny = torch.tensor([1e-30, 1e-45])
    x = torch.cat([middle, below, above, outside, -outside, tiny, -tiny])
    expected = torch.tensor([nearest_even(float(v), name) for v in x], dtype=torch.uint8)
    got = encode(x, element)
    assert torch.equal(decode(got, element), decode(expected, element))
    if not name.startswith("int"):
        assert torch.equal(got, expected)
    assert torch.equal(round_to_grid(x, element), decode(expected, element))


def decode_all(name: str) -> list[float]:
    return [ELEMENTS[name].values[c] for c in written_codes(name)]


@pytest.mark.parametrize("name", ELEMENTS)
def test_random_values_encode_to_the_nearest(name):
    x = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * MAXIMA[name] / 2.5
    values = torch.tensor(decode_all(name))
    error = (decode(encode(x, ELEMENTS[name]), ELEMENTS[name]) - x).abs()
    assert torch.equal(error, (values[None] - x[:, None]).abs().amin(dim=1))


@pytest.mark.parametrize(("name", "gain"), [("nf6", 0.6), ("nf5", 0.5), ("nf4", 0.5)])
def test_normal_levels_are_the_means_of_what_they_stand_for(name, gain):
    """Lloyd's condition under the searched scale, recomputed; and what it is worth."""
    g = torch.randn(3000, 128, generator=torch.Generator().manual_seed(3))
    fmt = parse_format(f"{name}-g128")
    q = quantize_weight(g, fmt)
    scale = per_weight(scale_values(q.scales), 128, 128)[: len(g)]
    x, index = (
        (g / scale).abs(),
        encode(g / scale, fmt.elements[0]).long() & (1 << fmt.bits - 1) - 1,
    )
    weights, levels = scale.square().expand_as(x), torch.tensor(fmt.elements[0].levels)
    means = torch.zeros_like(levels).index_add_(0, index.flatten(), (weights * x).flatten())
    means /= torch.zeros_like(levels).index_add_(0, index.flatten(), weights.flatten())
    # the sizes are in a ratio only: fit it, as a scale would
    means *= (means @ levels) / means.square().sum()
    assert (means - levels)[:-1].abs().max() < 1.25  # whole numbers, and 3,000 groups of chance
    assert snr_db(g, q) > snr_db(g, quantize_weight(g, parse_format(f"{OTHERS[name]}-g128"))) + gain


OTHERS = {"nf6": "fp6", "nf5": "fp5", "nf4": "int4"}


def snr_db(weight: torch.Tensor, quantised: QuantWeight) -> float:
    miss = (quantised.dequantize() - weight).square().sum()
    return float(10 * torch.log10(weight.square().sum() / miss))


def test_normal_levels_have_no_e8m0_scales():
    with pytest.raises(ConfigError, match="neither has a zero"):
        parse_format("nf6-g32", "e8m0")


def test_encode_leaves_its_input_alone():
    x = torch.linspace(-9, 9, 64)
    kept = x.clone()
    for element in ELEMENTS.values():
        encode(x, element)
        round_to_grid(x, element)
    assert torch.equal(x, kept)


def test_names():
    assert parse_format("fp6").elements[0].name == "e2m3"
    assert parse_format("fp6").scale == "float32"
    grouped = parse_format("fp6-e3m2-g128")
    assert (grouped.elements[0].name, grouped.group_size, grouped.scale) == ("e3m2", 128, "float16")
    assert parse_format("int4-g32", "e8m0").scale == "e8m0"
    assert parse_format("fp6-mixed").is_mixed
    assert (parse_format("mxfp6").group_size, parse_format("mxfp6").scale) == (32, "e8m0")
    assert all(parse_format(name) is fmt for name, fmt in FORMATS.items())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fp66", "did you mean 'fp6'"),
        ("int4-g48", "groups are 32, 64, 128"),
        ("mxfp6-g64", "its group is 32"),
        ("", "known: fp6"),
    ],
)
def test_unknown_names_are_refused_with_what_is_allowed(name, said):
    with pytest.raises(ConfigError, match=said):
        parse_format(name)
