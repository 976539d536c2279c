"""Adapters: the same outputs, gradients and files as PEFT; a run starts at the base to the bit."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from sterna.core.errors import ConfigError, ModelFileError, UnsupportedModelError
from sterna.model.load import load_model
from sterna.model.save import save_model
from sterna.quant.formats import parse_format
from sterna.quant.linear import dequantize_decoder
from sterna.quant.load import quantize_decoder
from sterna.train.adapter import (
    adapted_modules,
    add_adapter,
    merge_adapter,
    trainable_parameters,
)
from sterna.train.adapter_config import AdapterConfig
from sterna.train.adapter_file import load_adapter, save_adapter

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What differs between the two computations is the order of float32 sums over at most 96 terms
# through 3 layers; values are of order 1.
TOLERANCE = 2e-5
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "few": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    "one-layer": {"layers_to_transform": [1]},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}},
}


@pytest.fixture
def base(save_llama):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)).float()
    return model, save_llama(model)


@pytest.fixture
def save_llama(tmp_path):
    def save(model):
        model.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return save


def with_peft(model, **options):
    settings = {"r": 4, "lora_alpha": 16, "target_modules": PROJECTIONS, **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.1 * torch.randn_like(parameter))
    return adapted.eval()


def stir(decoder):
    """B away from zero, magnitudes away from the norms."""
    generator = torch.Generator().manual_seed(5)
    for _, module in adapted_modules(decoder):
        for part in module.adapters():
            part.B.data.normal_(0, 0.1, generator=generator)
            if part.magnitude is not None:
                part.magnitude.data.mul_(1.05)


@pytest.mark.parametrize("kind", list(KINDS))
def test_outputs_and_gradients_equal_peft(base, tmp_path, packed, tokens_of, kind):
    model, folder = base
    theirs = with_peft(model, **KINDS[kind])
    theirs.save_pretrained(tmp_path / "adapter")
    decoder = load_model(folder, "float32").decoder
    load_adapter(decoder, tmp_path / "adapter")
    tokens = tokens_of(40)
    expected = theirs(torch.tensor([tokens])).logits[0]
    logits = decoder(packed([tokens]))
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()
    target = torch.tensor(tokens[1:])
    F.cross_entropy(logits[:-1], target).backward()
    F.cross_entropy(expected[:-1], target).backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters()}
    compared = 0
    for _, module in adapted_modules(decoder):
        for part in module.adapters():
            for role, ours in (("A", part.A), ("B", part.B)):
                wanted = gradients[f"base_model.model.{part.span.name}.lora_{role}.weight"]
                error = (ours.grad - wanted).abs().max()
                assert error <= 1e-4 * wanted.abs().max() + 1e-7, (part.span.name, role)
                compared += 1
            if part.magnitude is not None:
                name = f"base_model.model.{part.span.name}.lora_magnitude_vector.weight"
                assert torch.allclose(part.magnitude.grad, gradients[name], rtol=1e-3, atol=1e-6)
    assert compared == 2 * sum("lora_A" in name for name in gradients)
    frozen = [p for n, p in decoder.named_parameters() if ".parts." not in n]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


@pytest.mark.parametrize("kind", list(KINDS))
def test_saved_adapters_load_in_peft_and_come_back(base, tmp_path, packed, tokens_of, kind):
    """PEFT -> Sterna -> PEFT: the same tensors, and PEFT computes the same logits from them."""
    model, folder = base
    theirs = with_peft(model, **KINDS[kind])
    theirs.save_pretrained(tmp_path / "adapter")
    tokens = torch.tensor([tokens_of(20)])
    expected = theirs(tokens).logits
    decoder = load_model(folder, "float32").decoder
    load_adapter(decoder, tmp_path / "adapter")
    save_adapter(decoder, tmp_path / "again", base_model="base")
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    after = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    plain = tf.LlamaForCausalLM.from_pretrained(folder)
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "again").eval()
    assert torch.equal(again(tokens).logits, expected)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantised", ["", "fp6", "int4-g32"])
def test_a_fresh_adapter_changes_no_bit_and_gets_gradients(
    decoder_of, packed, tokens_of, kind, dtype, quantised
):
    decoder = decoder_of("llama", dtype)
    if quantised:
        quantize_decoder(decoder, parse_format(quantised))
    batch = packed([tokens_of(30), tokens_of(9, 2)])
    with torch.no_grad():
        expected = decoder(batch)
    add_adapter(decoder, AdapterConfig(kind=kind, rank=4), seed=3)
    logits = decoder(batch)
    assert torch.equal(logits, expected)
    logits.square().mean().backward()
    for name, parameter in trainable_parameters(decoder).items():
        assert parameter.grad is not None, name
        if name.endswith(".B"):
            assert parameter.grad.abs().max() > 0, name


def test_every_family_adapts_merges_and_keeps_its_outputs(
    decoder_of, packed, tokens_of, family_name
):
    decoder = decoder_of(family_name)
    batch = packed([tokens_of(30)])
    with torch.no_grad():
        plain = decoder(batch)
    add_adapter(decoder, AdapterConfig(rank=4))
    stir(decoder)
    with torch.no_grad():
        adapted = decoder(batch)
        merge_adapter(decoder)
        merged = decoder(batch)
    scale = plain.abs().max()
    assert (adapted - plain).abs().max() > 1e-2 * scale
    assert (merged - adapted).abs().max() <= 2e-5 * scale
    assert not list(adapted_modules(decoder))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_over_a_quantised_base_equals_one_over_its_values(
    decoder_of, packed, tokens_of, kind
):
    batch = packed([tokens_of(30)])
    config = AdapterConfig(kind=kind, rank=4)
    results = []
    for is_plain in (False, True):
        decoder = decoder_of("llama")
        quantize_decoder(decoder, parse_format("fp6"))
        if is_plain:
            dequantize_decoder(decoder)
        add_adapter(decoder, config, seed=1)
        stir(decoder)
        logits = decoder(batch)
        logits.square().mean().backward()
        grads = [p.grad.clone() for p in trainable_parameters(decoder).values()]
        merge_adapter(decoder)
        results.append((logits.detach(), grads, decoder(batch).detach()))
    (over_codes, code_grads, code_merged), (over_values, value_grads, merged) = results
    scale = over_values.abs().max()
    assert (over_codes - over_values).abs().max() <= 5e-5 * scale
    for a, b in zip(code_grads, value_grads, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-7
    assert (code_merged - merged).abs().max() <= 5e-5 * scale


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_model_is_peft_merged(base, tmp_path, kind):
    model, folder = base
    theirs = with_peft(model, **KINDS[kind])
    theirs.save_pretrained(tmp_path / "adapter")
    decoder = load_model(folder, "float32").decoder
    load_adapter(decoder, tmp_path / "adapter")
    merge_adapter(decoder)
    save_model(decoder, tmp_path / "merged")
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    for name, value in theirs.merge_and_unload().state_dict().items():
        if name in ours:
            assert torch.allclose(ours[name], value, atol=1e-6), name


def test_dropout_acts_in_training_only(decoder_of, packed, tokens_of):
    decoder = decoder_of()
    add_adapter(decoder, AdapterConfig(rank=4, dropout=0.5))
    stir(decoder)
    batch = packed([tokens_of(20)])
    assert not torch.equal(decoder(batch), decoder(batch))
    decoder.eval()
    assert torch.equal(decoder(batch), decoder(batch))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ("q_prj",)}, "did you mean 'q_proj'"),
        ({"targets": ("lm_head",)}, "refused: the losses read the head as one matrix"),
        ({"targets": ("embed_tokens",)}, "refused: an embedding"),
        ({"layers": (0, 9)}, "layers 0 to 3"),
    ],
)
def test_impossible_settings_are_refused(decoder_of, options, words):
    with pytest.raises(ConfigError, match=words):
        add_adapter(decoder_of(), AdapterConfig(**options))


def test_a_second_adapter_and_a_missing_one_are_refused(decoder_of, tmp_path):
    decoder = decoder_of()
    for action in (merge_adapter, lambda d: save_adapter(d, tmp_path)):
        with pytest.raises(ConfigError, match="has no adapter"):
            action(decoder)
    add_adapter(decoder, AdapterConfig(rank=2))
    with pytest.raises(ConfigError, match="has an adapter already"):
        add_adapter(decoder, AdapterConfig(rank=2))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"peft_type": "IA3"}, UnsupportedModelError, "IA3"),
        ({"bias": "all"}, UnsupportedModelError, "bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedModelError, "modules_to_save"),
        ({"use_dora": True}, ModelFileError, "use_dora"),
    ],
)
def test_foreign_options_are_refused(decoder_of, tmp_path, changes, error, words):
    decoder = decoder_of()
    add_adapter(decoder, AdapterConfig(rank=2))
    save_adapter(decoder, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(error, match=words):
        load_adapter(decoder_of(), tmp_path)


def test_unfitting_files_are_named(decoder_of, tmp_path):
    decoder = decoder_of()
    add_adapter(decoder, AdapterConfig(rank=2, targets=("q_proj",)))
    save_adapter(decoder, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for change, words in [
        ({name: torch.zeros(2, 9)}, "asks for"),
        ({name.replace("layers.0", "layers.7"): torch.zeros(2, 64)}, "A and B are needed"),
        ({"base_model.model.lm_head.lora_embedding_A": torch.zeros(2, 64)}, "no part of an adapt"),
    ]:
        save_file({**tensors, **change}, path)
        with pytest.raises(ModelFileError, match=words):
            load_adapter(decoder_of(), tmp_path)
    path.write_bytes(b"junk")
    with pytest.raises(ModelFileError, match="damaged"):
        load_adapter(decoder_of(), tmp_path)
