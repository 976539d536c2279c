"""Models behind transformers: packed loss and every gradient against documents one at a time.

Tiny random configs, weights in float64. The bound is 1e-5 and not 1e-10, since transformers' eager
attention takes its softmax in float32. One row per architecture of the issue; grouped heads where
the family has them, a window shorter than the longest document where it has one.
"""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch.nn import functional as F

from sterna.core.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from sterna.model.batch import Batch
from sterna.model.hf import HFDecoder, load_hf
from sterna.model.hf_checks import prove

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CASES = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "llama-tied": lambda: tf.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: tf.Qwen2Config(**SIZES),
    "qwen3": lambda: tf.Qwen3Config(**SIZES, head_dim=8),
    "mistral": lambda: tf.MistralConfig(**SIZES, sliding_window=7),
    "phi3": lambda: tf.Phi3Config(**SIZES),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=20.0,
    ),
    "gpt-neox": lambda: tf.GPTNeoXConfig(**OLD),
    "falcon": lambda: tf.FalconConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2, **IDS,
    ),
    "falcon-new": lambda: tf.FalconConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=True, initializer_range=0.2, **IDS,
    ),
    "starcoder2": lambda: tf.Starcoder2Config(**SIZES, sliding_window=7),
    "gpt2": lambda: tf.GPT2Config(**GPT2, **IDS, initializer_range=0.2),
    "mixtral": lambda: tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": lambda: tf.Qwen2MoeConfig(
        **SIZES, **EXPERTS, shared_expert_intermediate_size=24
    ),
    "qwen3-moe": lambda: tf.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=8),
}  # fmt: skip
LENGTHS = (13, 1, 9)


def new_model(name, dtype=torch.float64):
    torch.manual_seed(0)
    config = CASES[name]()
    options = {"experts_implementation": "eager"} if hasattr(config, "num_experts_per_tok") else {}
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager", **options)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 61, (n,), generator=generator) for n in LENGTHS]


def batch_of(docs):
    lengths = [len(d) for d in docs]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    places = torch.cat([torch.arange(n) for n in lengths])
    parts = (torch.cat(docs), places, starts, torch.tensor(lengths))
    return Batch(*(part.int() for part in parts))


def targets_of(docs):
    return torch.cat([torch.cat([d[1:], d.new_tensor([-100])]) for d in docs])


def eager_loss(model, docs):
    total = 0.0
    for doc in docs:
        logits = model(input_ids=doc[None], use_cache=False).logits[0]
        total = total + F.cross_entropy(logits[:-1], doc[1:], reduction="sum")
    return total


def grads(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", CASES)
def test_packed_loss_and_gradients_are_those_of_documents_alone(name):
    model, docs = new_model(name), documents()
    expected = eager_loss(model, docs)
    expected.backward()
    theirs = grads(model)
    decoder = HFDecoder(model)
    prove(decoder)
    loss = F.cross_entropy(decoder(batch_of(docs)), targets_of(docs), reduction="sum")
    loss.backward()
    mine = grads(model)
    assert abs(loss - expected) <= 1e-6 * abs(expected)
    assert mine.keys() == theirs.keys()
    scale = max(float(g.abs().max()) for g in theirs.values())
    for key, grad in theirs.items():
        error = float((mine[key] - grad).abs().max())
        assert error <= 1e-5 * max(float(grad.abs().max()), 1e-3 * scale), (key, error)


def test_two_models_in_one_process_do_not_meet():
    a, b = HFDecoder(new_model("llama")), HFDecoder(new_model("qwen3"))
    docs = documents()
    with torch.no_grad():
        first = a(batch_of(docs))
        b(batch_of(docs[:1]))
        assert torch.equal(a(batch_of(docs)), first)


def test_a_saved_folder_is_what_transformers_reads(tmp_path):
    model = new_model("llama-tied", torch.float32)
    model.save_pretrained(tmp_path / "in")
    decoder = load_hf(tmp_path / "in")
    decoder.save(tmp_path / "out")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for (name, mine), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (lambda: tf.FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2,
                                 num_attention_heads=4, alibi=True, **IDS), "ALiBi"),
        (lambda: tf.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4), "ALiBi"),
        (lambda: tf.LlamaConfig(**SIZES, rope_parameters={
            "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
        (lambda: tf.LlamaConfig(**SIZES, rope_parameters={
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}), "mRoPE"),
        (lambda: tf.Qwen3NextConfig(**SIZES, head_dim=8, num_experts=2, num_experts_per_tok=1),
         "state"),
        (lambda: tf.GPTNeoConfig(vocab_size=61, hidden_size=32, num_layers=2, num_heads=4,
                                 attention_types=[[["global", "local"], 1]]), "registry"),
    ],
)  # fmt: skip
def test_what_cannot_be_proven_is_refused_with_the_reason(config, word):
    model = tf.AutoModelForCausalLM.from_config(config())
    with pytest.raises(UnsupportedModelError, match=word):
        HFDecoder(model)


def test_attention_sinks_are_refused():
    config = tf.GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(UnsupportedModelError, match="s_aux"):
        prove(HFDecoder(model))


def test_missing_folders_and_unreadable_ones_are_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        load_hf(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ModelFileError, match="transformers cannot load"):
        load_hf(tmp_path)
