"""The greedy choice against every choice; sensitivities against KLs that were measured."""

from __future__ import annotations

import itertools

import pytest
import torch

from sterna.core.errors import QuantizeError
from sterna.model.load import load_model
from sterna.quant.budget import Choice, choose_formats, price_formats
from sterna.quant.calibrate import input_mean_squares, windows
from sterna.quant.formats import parse_format
from sterna.quant.sensitivity import row_sensitivities

TOKENS = torch.randint(0, 70, (512,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture
def decoder(plain_folder):
    return load_model(plain_folder, "float32").decoder


@pytest.fixture
def choices(decoder):
    squares = input_mean_squares(decoder, TOKENS, "text")
    names = ("int4-g32", "int5-g32", "fp6", "int8")
    return price_formats(decoder, squares, row_sensitivities(decoder, TOKENS), names)


def _spent(choices, formats):
    picked = [c for c in choices if formats[c.name].name == c.format.name]
    return sum(c.num_bytes for c in picked), sum(c.cost for c in picked)


def test_more_bits_cost_less_and_the_budget_holds(decoder, choices):
    total = sum(p.numel() for p in decoder.parameters())
    rest = sum(2 * p.numel() for n, p in decoder.named_parameters() if "norm" in n)
    last = float("inf")
    for bits in (10, 12, 14, 18):  # these weights fill no tile, and headers weigh much here
        formats = choose_formats(choices, decoder, bits)
        num_bytes, cost = _spent(choices, formats)
        assert set(formats) == {c.name for c in choices}
        assert 8 * (num_bytes + rest) / total <= bits
        assert cost <= last
        last = cost
    assert {fmt.name for fmt in choose_formats(choices, decoder, 99).values()} == {"int8"}
    with pytest.raises(QuantizeError, match=r"4 bits a weight; at least \d"):
        choose_formats(choices, decoder, 4)


def test_greedy_against_every_choice(decoder):
    # Convex costs: greedy may lose at most its last step, here one of 8 bytes.
    formats = [parse_format(f) for f in ("int4", "int5", "int6", "int8")]
    g = torch.Generator().manual_seed(0)
    sizes = [(8 * i, 4.0**-i) for i in range(4)]
    names = [name for name, m in decoder.named_modules() if name.endswith(("qkv", "out", "down"))]
    weights = dict(zip(names, torch.rand(len(names), generator=g).tolist(), strict=True))
    choices = [Choice(n, formats[i], size, w * cost)
               for n, w in weights.items() for i, (size, cost) in enumerate(sizes)]  # fmt: skip
    total = sum(p.numel() for p in decoder.parameters())
    rest = sum(2 * p.numel() for n, p in decoder.named_parameters()
               if n.removesuffix(".weight") not in names)  # fmt: skip
    budget = 56
    bits = 8 * (rest + len(names) * 800 + budget) / total
    found = _spent(choices, choose_formats(choices, decoder, bits + 1e-9))
    options = itertools.product(range(4), repeat=len(names))
    best = min(sum(w * sizes[i][1] for w, i in zip(weights.values(), o, strict=True))
               for o in options if sum(sizes[i][0] for i in o) <= budget)  # fmt: skip
    assert found[0] <= budget
    assert found[1] == pytest.approx(best)


def test_sensitivities_predict_the_kl_of_an_error(decoder):
    # Random errors on one weight at a time, the mean of 8; second order, 256 tokens drawn.
    sensitivity = row_sensitivities(decoder, TOKENS)
    squares = input_mean_squares(decoder, TOKENS, "text")
    batches = list(windows(TOKENS, 64))
    g = torch.Generator().manual_seed(0)
    for name in ("layers.0.attn.qkv", "layers.0.mlp.gate_up", "layers.1.mlp.down", "lm_head"):
        weight = decoder.get_parameter(f"{name}.weight")
        predicted = measured = 0.0
        for _ in range(8):
            error = torch.randn(weight.shape, generator=g) * 0.01
            predicted += float((error.square() @ squares[name]) @ sensitivity[name]) / 2
            measured += _kl(decoder, weight, error, batches) / len(TOKENS)
        assert 0.5 < predicted / measured < 2, (name, predicted / measured)
    assert not any(module._forward_hooks for module in decoder.modules())


@torch.no_grad()
def _kl(decoder, weight, error, batches):
    plain = [decoder(batch).log_softmax(-1) for batch in batches]
    weight += error
    found = [decoder(batch).log_softmax(-1) for batch in batches]
    weight -= error
    return sum(float((p.exp() * (p - q)).sum()) for p, q in zip(plain, found, strict=True))
