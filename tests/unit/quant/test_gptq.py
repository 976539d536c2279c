"""GPTQ against rounding to nearest and brute force; Hessians against a hand-made pass."""

from __future__ import annotations

import itertools

import pytest
import torch

from sterna.core.errors import QuantizeError
from sterna.kernels.quant_weight import scale_values
from sterna.model.load import load_model
from sterna.quant.formats import parse_format
from sterna.quant.gptq import GPTQOptions, gptq_weight
from sterna.quant.hessian import MIN_TOKENS, Hessians
from sterna.quant.rtn import quantize_weight

# Every element, one scale a row, groups that do not divide 100 inputs, e8m0, rows that choose.
FORMATS = ["fp6", "fp6-e3m2", "fp6-mixed", "fp5", "fp4", "fp8", "int4", "int5", "int6", "int8",
           "fp6-g128", "fp6-mixed-g32", "int4-g32", "int5-g64", "mxfp4", "mxfp6", "nf6", "nf5-g32",
           "nf4-g64"]  # fmt: skip


@pytest.fixture(scope="module")
def problem():
    """A weight [50, 100] and the Hessian of correlated inputs of unequal size."""
    g = torch.Generator().manual_seed(0)
    mix = torch.eye(100) / 2 + torch.randn(100, 100, generator=g) / 10
    size = torch.randn(100, generator=g).mul(0.7).exp()
    x = torch.randn(1000, 100, generator=g) @ mix * size
    return torch.randn(50, 100, generator=g) * 0.1, x.t() @ x / 1000


def _loss(weight, quantised, hessian):
    miss = quantised.dequantize() - weight
    return float((miss @ hessian * miss).sum())


@pytest.mark.parametrize("name", FORMATS)
def test_output_error_is_below_that_of_rounding(problem, name):
    weight, hessian = problem
    fmt = parse_format(name)
    nearest = quantize_weight(weight, fmt, importance=hessian.diagonal().clone())
    plain = _loss(weight, nearest, hessian)
    assert _loss(weight, gptq_weight(weight, hessian, fmt), hessian) < 0.75 * plain
    kept = gptq_weight(weight, hessian, fmt, GPTQOptions(is_act_order=False, is_refitted=False))
    assert _loss(weight, kept, hessian) < plain


def test_a_diagonal_hessian_is_rounding_to_nearest(problem):
    weight, hessian = problem
    diagonal = hessian.diagonal().clone()
    fmt = parse_format("fp6-g32")
    found = gptq_weight(weight, diagonal.diag(), fmt, GPTQOptions(is_refitted=False))
    expected = quantize_weight(weight, fmt, importance=diagonal)
    assert torch.equal(found.dequantize(), expected.dequantize())  # codes: but for the zero's sign
    assert torch.equal(found.scales, expected.scales)


def test_blocks_only_order_the_work(problem):
    weight, hessian = problem
    losses = [
        _loss(weight, gptq_weight(weight, hessian, parse_format("int4"), GPTQOptions(block=b)),
              hessian)
        for b in (1, 7, 128)
    ]  # fmt: skip
    # The same sums in another order: float32 rounding may tip a code that lies on a border.
    assert max(losses) < 1.02 * min(losses)


def test_three_inputs_against_every_choice():
    # Nearly tied inputs: errors of unlike signs cancel, which rounding to nearest cannot know.
    hessian = torch.eye(3) * 0.05 + 0.95
    weight = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    fmt = parse_format("int4")
    quantised = gptq_weight(weight, hessian, fmt, GPTQOptions(damping=1e-6, is_refitted=False))
    scales = scale_values(quantised.scales).transpose(1, 2).reshape(-1)[:64]
    choices = torch.tensor(list(itertools.product(range(-7, 8), repeat=3))).float()
    misses = weight[:, None] - choices * scales[:, None, None]
    best = float((misses @ hessian * misses).sum(-1).amin(1).sum())
    nearest = quantize_weight(weight, fmt, importance=torch.ones(3))
    loss = _loss(weight, quantised, hessian)
    assert 0.9999 * best < loss < 1.5 * best  # the reference sums in another order
    assert loss < 0.9 * _loss(weight, nearest, hessian)


def test_zero_rows_dead_inputs_and_gated_halves(problem):
    weight, hessian = problem[0].clone(), problem[1].clone()
    weight[3] = 0
    hessian[5], hessian[:, 5] = 0, 0
    found = gptq_weight(weight, hessian, parse_format("fp6-mixed"), is_gated=True)
    values = found.dequantize()
    assert (found.out_features, values.shape) == (25, (50, 100))
    assert values[3].abs().sum() == 0
    assert torch.isfinite(values).all()
    # Nobody leans on the dead input, whose weights are rounded to nearest.
    assert (values[:, 5] - weight[:, 5]).abs().max() < 0.03


def test_what_cannot_be_rounded_is_refused(problem):
    weight, hessian = problem
    fmt = parse_format("fp6")
    bad = weight.clone()
    bad[1, 2] = float("nan")
    with pytest.raises(QuantizeError, match=r"qkv: 1 NaN"):
        gptq_weight(bad, hessian, fmt, name="qkv")
    with pytest.raises(QuantizeError, match=r"qkv: a Hessian of \(9, 9\), the weight has 100"):
        gptq_weight(weight, torch.eye(9), fmt, name="qkv")
    with pytest.raises(QuantizeError, match="qkv: its Hessian is not positive"):
        gptq_weight(weight, hessian - 10 * torch.ones(100, 100), fmt, name="qkv")


def test_hessians_are_those_of_the_forward(plain_folder):
    decoder = load_model(plain_folder, "float32").decoder
    tokens = torch.randint(0, 70, (MIN_TOKENS,), generator=torch.Generator().manual_seed(0))
    hessians = Hessians(decoder, tokens.tolist(), "text")
    seen = {}

    def keep(name):
        return lambda module, args: seen.setdefault(name, []).append(args[0])

    names = [f"layers.{i}.{m}" for i in range(2) for m in ("attn.qkv", "attn.out", "mlp.down")]
    handles = [decoder.get_submodule(n).register_forward_pre_hook(keep(n)) for n in names]
    with torch.inference_mode():
        seen["lm_head"] = [decoder.hidden(batch) for batch in hessians._batches]
    for handle in handles:
        handle.remove()
    for name in (*names, "lm_head", "layers.0.attn.out"):  # and back to a layer that is past
        x = torch.cat(seen[name])
        assert torch.allclose(hessians.get(name), x.t() @ x / MIN_TOKENS, rtol=1e-4, atol=1e-5)
    assert hessians.get("embed_tokens") is None
    assert not any(module._forward_pre_hooks for module in decoder.modules())


@pytest.mark.parametrize("count", [0, 1, MIN_TOKENS - 1])
def test_an_empty_or_short_text_is_refused(plain_folder, count):
    decoder = load_model(plain_folder, "float32").decoder
    with pytest.raises(QuantizeError, match=f"a.txt: {count} tokens, GPTQ needs at least"):
        Hessians(decoder, [1] * count, "a.txt")


def test_a_model_that_fails_on_the_text_is_named(plain_folder):
    decoder = load_model(plain_folder, "float32").decoder
    decoder.layers[0].mlp.down.weight.data[0, 0] = float("nan")
    hessians = Hessians(decoder, [1] * MIN_TOKENS, "text")
    with pytest.raises(QuantizeError, match=r"inputs of layers\.1\.attn\.qkv are not finite"):
        hessians.get("layers.1.attn.qkv")
