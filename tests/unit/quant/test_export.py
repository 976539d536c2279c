"""Quantised folders back to plain ones: exact values, readable by transformers."""

from __future__ import annotations

import json

import pytest
import torch

from sterna.core.errors import QuantizeError
from sterna.model.load import load_model
from sterna.quant.convert import QuantizeOptions, quantize_folder
from sterna.quant.export import dequantize_folder
from sterna.quant.formats import parse_format
from sterna.quant.linear import quant_modules
from sterna.quant.load import load_quantized
from sterna.text.tokenizer import load_tokenizer


@pytest.mark.parametrize("name", ["fp6-mixed", "int4-g32"])
def test_the_plain_folder_holds_the_quantised_values_exactly(plain_folder, tmp_path, name):
    quantize_folder(plain_folder, tmp_path / "q", QuantizeOptions(parse_format(name)))
    dequantize_folder(tmp_path / "q", tmp_path / "plain32")
    plain = load_model(tmp_path / "plain32", "float32").decoder
    for module_name, module in quant_modules(load_quantized(tmp_path / "q").decoder):
        values = module.quant_weight.dequantize()
        assert torch.equal(plain.get_parameter(f"{module_name}.weight"), values)
    config = json.loads((tmp_path / "plain32" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert load_tokenizer(tmp_path / "plain32").encode("#") == load_tokenizer(plain_folder).encode(
        "#"
    )


def test_transformers_reads_the_plain_folder(plain_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    quantize_folder(plain_folder, tmp_path / "q", QuantizeOptions(parse_format("fp6")))
    dequantize_folder(tmp_path / "q", tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ours = load_model(tmp_path / "hf", "float32").decoder
    assert torch.equal(theirs.model.layers[1].mlp.down_proj.weight, ours.layers[1].mlp.down.weight)


def test_what_is_plain_or_in_the_way_is_refused(plain_folder, tmp_path):
    with pytest.raises(QuantizeError, match="not quantised; there is nothing to undo"):
        dequantize_folder(plain_folder, tmp_path / "out")
    quantize_folder(plain_folder, tmp_path / "q", QuantizeOptions(parse_format("fp6")))
    with pytest.raises(QuantizeError, match="is there already"):
        dequantize_folder(tmp_path / "q", plain_folder)
