"""GPTQ and AWQ folders: packed here as their tools pack, read natively and as plain weights."""

from __future__ import annotations

import pytest
import torch

from sterna.core.errors import UnsupportedModelError
from sterna.quant.convert import QuantizeOptions, quantize_folder
from sterna.quant.formats import parse_format
from sterna.quant.linear import quant_modules
from sterna.quant.load import load_quantized
from sterna.quant.sources import open_source

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[n, m] codes -> int32 [n, m * bits / 32], low bits first."""
    per = 32 // bits
    shifts = torch.arange(0, 32, bits)
    return (codes.long().view(len(codes), -1, per) << shifts).sum(-1).to(torch.int32)


def packed(name, weight, *, method, bits=4, group=32, symmetric=True, shuffled=False):
    """Quantise [out, in] as the tools do; its tensors and the weights they stand for."""
    out, k = weight.shape
    g = torch.Generator().manual_seed(len(name))
    size = group or k
    groups = torch.arange(k) // size
    if shuffled:
        groups = groups[torch.randperm(k, generator=g)]
    num = -(-k // size)
    scales = (torch.rand(num, out, generator=g) * 0.05 + 0.02).half()
    middle = 1 << (bits - 1)
    zeros = torch.full((num, out), middle)
    if not symmetric:
        zeros = torch.randint(1, 1 << bits, (num, out), generator=g)
    q = torch.round(weight.float().t() / scales.float()[groups]) + zeros[groups]
    q = q.clamp(0, (1 << bits) - 1)
    plain = ((q - zeros[groups]) * scales.float()[groups]).t()
    if method == "awq":

        def columns(x):
            return words(x.long().view(len(x), -1, 8)[:, :, AWQ_ORDER].flatten(1), bits)

        tensors = {"qweight": columns(q), "qzeros": columns(zeros), "scales": scales}
    else:
        tensors = {"qweight": words(q.t(), bits).t(), "qzeros": words(zeros - 1, bits),
                   "scales": scales, "g_idx": groups.int()}  # fmt: skip
    return {f"{name}.{part}": t.contiguous() for part, t in tensors.items()}, plain


def checkpoint(make_folder, folder, method, **kind):
    """A folder whose block weights are packed, and the plain weights they stand for."""
    g = torch.Generator().manual_seed(3)
    shapes = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64),
              "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64),
              "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64),
              "mlp.down_proj": (64, 96)}  # fmt: skip
    tensors = {"model.embed_tokens.weight": torch.randn(70, 64, generator=g).half(),
               "model.norm.weight": torch.ones(64).half()}  # fmt: skip
    plain = {}
    for i in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(64).half()
        for part, shape in shapes.items():
            name = f"model.layers.{i}.{part}"
            weight = torch.randn(*shape, generator=g) * 0.2
            more, plain[name] = packed(name, weight, method=method, **kind)
            tensors |= more
    bits = kind.get("bits", 4)
    section = {"quant_method": method, "bits": bits, "group_size": kind.get("group", 32) or -1}
    config = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
    return make_folder(folder, tensors, quantization_config=section, **config), plain


KINDS = [
    ("gptq", {}, "int4-g32"),
    ("gptq", {"group": 0}, "int4"),
    ("gptq", {"symmetric": False}, "int5-g32"),
    ("gptq", {"bits": 8}, "int8-g32"),
    ("awq", {"symmetric": False}, "int5-g32"),
    ("awq", {}, "int4-g32"),
]


PARTS = {
    "mlp.down": ["mlp.down_proj"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "attn.qkv": [f"self_attn.{p}_proj" for p in "qkv"],
}


@pytest.mark.parametrize(("method", "kind", "form"), KINDS)
def test_packed_weights_run_natively_without_loss(make_folder, tmp_path, method, kind, form):
    folder, plain = checkpoint(make_folder, tmp_path / "in", method, **kind)
    names = ("layers.1.mlp.down", "layers.0.attn.qkv", "layers.1.mlp.gate_up")
    source = open_source(folder)
    found = [source.packed.form(source.packed_names(n)) for n in names]
    assert {(f.format.name, f.is_native) for f in found} == {(form, True)}
    decoder = load_quantized(folder, "float32").decoder
    modules = dict(quant_modules(decoder))
    assert len(modules) == 8
    for name, parts in PARTS.items():
        expected = torch.cat([plain[f"model.layers.1.{part}"] for part in parts])
        assert torch.equal(modules[f"layers.1.{name}"].quant_weight.dequantize(), expected)
    assert torch.equal(
        source.source.read("model.layers.0.mlp.down_proj.weight", torch.float32),
        plain["model.layers.0.mlp.down_proj"],
    )


@pytest.mark.parametrize(
    "kind", [{"shuffled": True}, {"group": 16}, {"bits": 8, "symmetric": False}]
)
def test_what_has_no_native_form_becomes_int8_in_groups(make_folder, tmp_path, kind):
    folder, plain = checkpoint(make_folder, tmp_path / "in", "gptq", **kind)
    modules = dict(quant_modules(load_quantized(folder).decoder))
    got = modules["layers.1.mlp.down"].quant_weight
    assert (got.bits, got.group_size) == (8, 32)
    expected = plain["model.layers.1.mlp.down_proj"]
    error = (got.dequantize() - expected).norm() / expected.norm()
    assert error < 0.006


def test_a_packed_checkpoint_is_kept_in_a_container(make_folder, tmp_path):
    folder, plain = checkpoint(make_folder, tmp_path / "in", "gptq")
    report = quantize_folder(folder, tmp_path / "out", QuantizeOptions(None))
    assert {w.format for w in report.weights} == {"int4-g32"}
    assert {w.weight_error for w in report.weights} == {0.0}
    ours = dict(quant_modules(load_quantized(tmp_path / "out").decoder))
    theirs = dict(quant_modules(load_quantized(folder).decoder))
    assert ours.keys() == theirs.keys()
    for name, module in ours.items():
        assert torch.equal(module.tiles, theirs[name].tiles)
    assert len(plain) == 14


def test_a_packed_checkpoint_can_be_quantised_to_another_format(make_folder, tmp_path):
    folder, _ = checkpoint(make_folder, tmp_path / "in", "awq")
    report = quantize_folder(folder, tmp_path / "out", QuantizeOptions(parse_format("fp6")))
    assert {w.format for w in report.weights} == {"fp6"}
    load_quantized(tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "bits", "said"),
    [("gptq", 3, "gptq with 3 bits"), ("awq", 3, "awq with 3 bits"),
     ("bitsandbytes", 4, "unknown quant_method 'bitsandbytes'")],
)  # fmt: skip
def test_other_packings_are_refused(make_folder, tensors, tmp_path, method, bits, said):
    section = {"quant_method": method, "bits": bits}
    folder = make_folder(tmp_path / "in", tensors, quantization_config=section)
    with pytest.raises(UnsupportedModelError, match=said):
        load_quantized(folder)
