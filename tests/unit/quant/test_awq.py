"""Channel scales leave the model what it was and lower the error they are searched for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sterna.model.load import load_model
from sterna.quant.awq import channel_scales
from sterna.quant.calibrate import input_mean_squares, windows
from sterna.quant.convert import QuantizeOptions, quantize_folder
from sterna.quant.formats import parse_format


@pytest.fixture
def calibrated(plain_folder):
    decoder = load_model(plain_folder, "float32").decoder
    g = torch.Generator().manual_seed(0)
    for block in decoder.layers:  # some channels are large, as in real models
        block.attn_norm.weight.data.mul_(torch.randn(40, generator=g).exp())
        block.mlp_norm.weight.data.mul_(torch.randn(40, generator=g).exp())
    tokens = torch.randint(0, 70, (1024,), generator=g).tolist()
    return decoder, tokens, input_mean_squares(decoder, tokens, "text")


def test_the_folded_model_computes_the_same(calibrated):
    decoder, tokens, squares = calibrated
    scales = channel_scales(decoder, squares, parse_format("int4"))
    assert set(scales.columns) == {f"layers.{i}.{m}" for i in range(2)
                                   for m in ("attn.qkv", "mlp.gate_up")}  # fmt: skip
    assert any(bool((s != 1).any()) for s in scales.columns.values())
    batch = next(windows(tokens, 64))
    with torch.no_grad():
        before = decoder(batch)
        for name, factors in scales.columns.items():
            decoder.get_submodule(name).weight.mul_(factors)
        for name, value in scales.norms.items():
            assert torch.equal(value, value.bfloat16().float()), name
            decoder.get_parameter(name).copy_(value)
        after = decoder(batch)
    # float32: s and 1/s each round once, 2^-24, in some forty terms.
    assert torch.allclose(before, after, rtol=1e-5, atol=1e-5)


def test_output_errors_fall_and_files_differ(plain_folder, tmp_path):
    widths = {"attn.qkv": 40, "mlp.gate_up": 40, "mlp.down": 56}
    squares = {
        f"layers.{i}.{m}": torch.logspace(-3, 1, widths[m]) for i in range(2) for m in widths
    }
    fmt = parse_format("int4")
    plain = QuantizeOptions(fmt, importance=squares)
    scaled = replace(plain, awq=channel_scales(load_model(plain_folder).decoder, squares, fmt))
    before = quantize_folder(plain_folder, tmp_path / "rtn", plain)
    after = quantize_folder(plain_folder, tmp_path / "awq", scaled)
    errors = [{w.name: w.output_error for w in r.weights} for r in (before, after)]
    for name in ("layers.0.attn.qkv", "layers.1.mlp.gate_up"):
        assert errors[1][name] < errors[0][name]  # by 2 to 5 % on random weights
    assert errors[1]["layers.0.mlp.down"] == errors[0]["layers.0.mlp.down"]
    assert quantize_folder(plain_folder, tmp_path / "awq", scaled) is None  # done already
