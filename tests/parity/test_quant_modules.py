"""A decoder on quantised weights against the same decoder on the dequantised ones.

Families: Llama (untied, gated), Qwen2 (biases, tied), OPT (biases everywhere, plain MLP, learned
positions), Gemma 3 (scaled embeddings, soft caps, post norms). Sizes that fill no tile.
"""

from __future__ import annotations

import copy

import pytest
import torch

from sterna.core.errors import ConfigError
from sterna.kernels.quant_weight import int8_unit
from sterna.model.config import parse_config
from sterna.model.decoder import Decoder
from sterna.quant.formats import FORMATS as FORMAT_TABLE
from sterna.quant.formats import parse_format
from sterna.quant.linear import (
    describe_weights,
    quant_modules,
    replace_weight,
    use_int8_activations,
    weight_shapes,
)
from sterna.quant.rtn import quantize_weight

SIZES = {"vocab_size": 70, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
CONFIGS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "intermediate_size": 56, **SIZES},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "intermediate_size": 56,
              "tie_word_embeddings": True, **SIZES},
    "opt": {"architectures": ["OPTForCausalLM"], "ffn_dim": 56, **SIZES},
    "gemma3": {"architectures": ["Gemma3ForCausalLM"], "intermediate_size": 56, **SIZES,
               "head_dim": 16, "final_logit_softcapping": 5.0},
}  # fmt: skip
FORMATS = ("fp6", "int4-g32", "fp6-mixed", "mxfp4")


def random_decoder(family: str, dtype: torch.dtype) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(parse_config(CONFIGS[family], family), dtype)
    for p in decoder.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return decoder


def quantised_and_dequantised(decoder: Decoder, name: str) -> tuple[Decoder, Decoder]:
    plain = copy.deepcopy(decoder)
    for module_name, *_, is_gated in list(weight_shapes(decoder)):
        weight = decoder.get_submodule(module_name).weight.detach()
        q = quantize_weight(weight, parse_format(name), search="absmax", is_gated=is_gated)
        replace_weight(decoder, module_name, q)
        plain.get_submodule(module_name).weight.data = q.dequantize()
    return decoder, plain


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_equal_those_of_the_dequantised_decoder(family, name, packed):
    decoder, plain = quantised_and_dequantised(random_decoder(family, torch.float32), name)
    assert len(list(quant_modules(decoder))) == 2 * 4 + 2 - decoder.config.tie_word_embeddings
    batch = packed([[5, 6, 7, 8, 9], [1, 2, 69]])
    with torch.no_grad():
        ours, theirs = decoder(batch), plain(batch)
    # float32 sums in another order through two layers
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_paged_steps_equal_the_whole_forward(family, paged, packed):
    decoder, _ = quantised_and_dequantised(random_decoder(family, torch.float32), "fp6")
    decoder.prepare_inference()
    runner = paged(decoder)
    runner.add("a")
    tokens = [5, 6, 7, 8, 9, 1, 2]
    pieces = [runner.step({"a": tokens[:4]}), runner.step({"a": tokens[4:5]}),
              runner.step({"a": tokens[5:]})]  # fmt: skip
    with torch.no_grad():
        whole = decoder(packed([tokens]))
    assert (torch.cat(pieces) - whole).abs().max() <= 1e-4 * whole.abs().max()


def test_gradients_reach_the_norms_but_no_quantised_weight(packed):
    decoder, _ = quantised_and_dequantised(random_decoder("llama", torch.float32), "fp6")
    decoder(packed([[1, 2, 3]])).logsumexp(dim=-1).sum().backward()
    assert {name for name, p in decoder.named_parameters() if p.grad is None} == set()
    assert all("norm" in name for name, _ in decoder.named_parameters())


def test_int8_activations_are_refused_where_the_weights_do_not_allow_them(packed):
    decoder = random_decoder("llama", torch.float32)
    with pytest.raises(ConfigError, match="weights are plain"):
        use_int8_activations(decoder)
    eight, _ = quantised_and_dequantised(decoder, "fp8")
    with pytest.raises(ConfigError, match=r"embed_tokens is stored in fp8"):
        use_int8_activations(eight)
    assert not any(module.int8_activations for _, module in quant_modules(eight))


@pytest.mark.parametrize("family", CONFIGS)
def test_int8_activations_reach_every_quantised_weight(family, packed):
    """Against the reference forward of the same modules; weights left plain stay plain."""
    decoder, _ = quantised_and_dequantised(random_decoder(family, torch.float32), "int8")
    batch = packed([[5, 6, 7, 8, 9], [1, 2, 69]])
    with torch.no_grad():
        plain = decoder(batch)
        use_int8_activations(decoder)
        rounded = decoder(batch)
    assert "int8 activations (W8A8)" in describe_weights(decoder)
    error = (rounded - plain).abs().max() / plain.abs().max()
    assert 1e-5 < error < 0.1  # 127 steps a row, two layers; 0 would be a mode that is not on


@pytest.mark.parametrize("name", [name for name in FORMAT_TABLE if name != "fp8"])
def test_the_integer_unit_is_the_kernels(name):
    table = parse_format(name).table()
    unit = int8_unit(table)
    assert bool((table / unit == (table / unit).round()).all())
    cpu = pytest.importorskip("sterna.kernels._cpu")
    assert unit == cpu.int8_unit(table.data_ptr(), table.numel())
