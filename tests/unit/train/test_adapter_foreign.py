"""Adapters on models behind transformers: outputs, gradients, files and merges are PEFT's."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tests.parity.test_hf import CASES, IDS, SIZES, batch_of, documents, new_model, targets_of
from torch.nn import functional as F

from sterna.core.errors import ConfigError, UnsupportedModelError
from sterna.model.hf import HFDecoder
from sterna.quant.foreign import dequantize_foreign, quantize_foreign
from sterna.quant.formats import parse_format
from sterna.train.adapter import adapted_modules, add_adapter, merge_adapter
from sterna.train.adapter_config import AdapterConfig
from sterna.train.adapter_file import load_adapter, save_adapter

# Differences are the order of float32 sums over at most 48 terms through two layers.
TOLERANCE = 3e-5
EXPERTS = {"mixtral", "qwen2-moe", "qwen3-moe"}
KINDS = {"lora": {}, "dora": {"use_dora": True}}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
WIDE = SIZES | {"hidden_size": 64, "intermediate_size": 128}
QUANTISED = {
    "llama": lambda: tf.LlamaConfig(**WIDE),
    "phi3": lambda: tf.Phi3Config(**WIDE),
    "gpt2": lambda: tf.GPT2Config(vocab_size=61, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "falcon": lambda: tf.FalconConfig(vocab_size=61, hidden_size=64, num_hidden_layers=2,
                                      num_attention_heads=4, **IDS),
}  # fmt: skip


def with_peft(model, **options):
    settings = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.1 * torch.randn_like(parameter))
    return adapted.eval()


def loss_of(decoder, docs):
    return F.cross_entropy(decoder(batch_of(docs)), targets_of(docs), reduction="sum")


def both(name, folder, **options):
    """PEFT's model, and ours with its adapter."""
    plain = new_model(name, torch.float32)
    decoder = HFDecoder(copy.deepcopy(plain))
    theirs = with_peft(plain, **options)
    theirs.save_pretrained(folder)
    load_adapter(decoder, folder)
    return theirs, decoder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_files_and_merges_are_those_of_peft(name, kind, tmp_path):
    docs = documents()[:1]
    # PEFT's all-linear takes in the experts, which are no linear modules.
    named = {"target_modules": ATTENTION} if name in EXPERTS else {}
    theirs, decoder = both(name, tmp_path / "in", **KINDS[kind], **named)
    expected = theirs(input_ids=docs[0][None], use_cache=False).logits[0]
    logits = decoder(batch_of(docs))
    scale = expected.abs().max()
    assert (logits - expected).abs().max() <= TOLERANCE * scale
    F.cross_entropy(logits, targets_of(docs)).backward()
    F.cross_entropy(expected, targets_of(docs)).backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters()}
    parts = [p for _, module in adapted_modules(decoder) for p in module.adapters()]
    assert 2 * len(parts) == sum("lora_A" in n or "lora_B" in n for n in gradients)
    most = max(float(g.abs().max()) for g in gradients.values() if g is not None)
    for part in parts:
        for role in ("A", "B"):
            wanted = gradients[f"base_model.model.{part.span.name}.lora_{role}.weight"]
            error = (getattr(part, role).grad - wanted).abs().max()
            assert error <= 1e-4 * max(wanted.abs().max(), 1e-3 * most), (part.span.name, role)
    save_adapter(decoder, tmp_path / "out")
    before, after = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = peft.PeftModel.from_pretrained(new_model(name, torch.float32), tmp_path / "out")
    assert torch.equal(again.eval()(input_ids=docs[0][None], use_cache=False).logits[0], expected)
    merge_adapter(decoder)
    merged = dict(theirs.merge_and_unload().named_parameters())
    for key, value in decoder.tensors():
        assert torch.allclose(value, merged[key], atol=1e-5), key


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit_and_gets_gradients(kind, dtype):
    decoder, docs = HFDecoder(new_model("gpt2", dtype)), documents()
    with torch.no_grad():
        before = decoder(batch_of(docs))
    add_adapter(decoder, AdapterConfig.model_validate({"kind": kind, "rank": 4}))
    loss = loss_of(decoder, docs)
    assert torch.equal(decoder(batch_of(docs)), before)
    loss.backward()
    trained = {n: p for n, p in decoder.named_parameters() if p.requires_grad}
    assert trained and all(".parts." in n and p.dtype == torch.float32 for n, p in trained.items())
    assert all(p.grad.any() for n, p in trained.items() if n.endswith("B"))


@pytest.mark.parametrize("fmt", ["fp6", "int4-g32"])
@pytest.mark.parametrize("name", QUANTISED)
def test_an_adapter_over_a_quantised_base_is_one_over_its_values(name, fmt):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(QUANTISED[name]()).eval()
    codes, docs = HFDecoder(model), documents()
    quantize_foreign(codes, parse_format(fmt))
    values = HFDecoder(copy.deepcopy(model))
    dequantize_foreign(values)
    losses = []
    for decoder in (codes, values):
        add_adapter(decoder, AdapterConfig(rank=4), seed=3)
        for _, module in adapted_modules(decoder):
            for part in module.adapters():
                part.B.data.copy_(torch.sin(torch.arange(part.B.numel())).view_as(part.B) * 0.05)
        losses.append(loss_of(decoder, docs))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    grads = [[p.grad for p in d.parameters() if p.requires_grad] for d in (codes, values)]
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6
    with torch.no_grad():
        adapted = codes(batch_of(docs))
        merge_adapter(codes)
        assert (codes(batch_of(docs)) - adapted).abs().max() <= 1e-4 * adapted.abs().max()
    kinds = {type(m) for m in codes.modules()}
    assert not any("Quant" in kind.__name__ for kind in kinds)


def test_patterns_and_ends_of_names_choose_modules():
    def chosen(*targets, layers=()):
        decoder = HFDecoder(new_model("llama", torch.float32))
        add_adapter(decoder, AdapterConfig(rank=2, targets=targets, layers=layers))
        return [name.removeprefix("model.model.layers.") for name, _ in adapted_modules(decoder)]

    assert chosen("q_proj") == ["0.self_attn.q_proj", "1.self_attn.q_proj"]
    assert chosen("self_attn.k_proj", layers=(1,)) == ["1.self_attn.k_proj"]
    assert chosen("*.1.mlp.*") == ["1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"]
    with pytest.raises(ConfigError, match="did you mean 'q_proj'"):
        chosen("q_prj")
    with pytest.raises(ConfigError, match="refused: the losses"):
        chosen("lm_head")


def test_what_would_leave_experts_out_is_refused():
    decoder = HFDecoder(new_model("mixtral", torch.float32))
    with pytest.raises(UnsupportedModelError, match="holds all experts"):
        quantize_foreign(decoder, parse_format("fp6"))
    with pytest.raises(ConfigError, match=r"all-linear.*name what is adapted"):
        add_adapter(decoder, AdapterConfig(rank=2))
