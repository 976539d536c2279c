"""Every encoder family against transformers: tiny random models, float32.

Lengths: 1 token, a block of 16 and one more, and more than two local windows (8 either way). The
initialisation is wide (std 0.1), so that a wrong table or norm shows. Bound: 1e-5 of the largest
magnitude, some ten float32 roundings of sums of 64 to 128 products.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from sterna.engine.pack import pack
from sterna.kernels import ops
from sterna.kernels.load import load_kernels
from sterna.model.encoder_heads import score_of
from sterna.model.encoder_load import load_encoder

LENGTHS = (1, 16, 17, 40)
BOUND = 1e-5
SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
MODERN = {**SIZES, "num_hidden_layers": 4, "local_attention": 16, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}  # fmt: skip
GTE = {**SIZES, "pad_token_id": 0}

BASES: dict[str, Any] = {
    "bert": lambda: (tf.BertModel, tf.BertConfig(**SIZES)),
    "roberta": lambda: (tf.RobertaModel, tf.RobertaConfig(**SIZES, pad_token_id=1)),
    "xlm-roberta": lambda: (tf.XLMRobertaModel, tf.XLMRobertaConfig(**SIZES, pad_token_id=1)),
    "gte": lambda: (tf.GteModel, tf.GteConfig(**GTE)),
    "gte-no-types": lambda: (tf.GteModel, tf.GteConfig(**GTE, type_vocab_size=0)),
    "nomic-bert": lambda: (tf.NomicBertModel, tf.NomicBertConfig(**GTE)),
    "modernbert": lambda: (tf.ModernBertModel, tf.ModernBertConfig(**MODERN)),
    "modernbert-bias": lambda: (
        tf.ModernBertModel,
        tf.ModernBertConfig(**MODERN, norm_bias=True, attention_bias=True),
    ),
}
HEADS: dict[str, Any] = {
    "bert": lambda: (tf.BertForSequenceClassification, tf.BertConfig(**SIZES, num_labels=1)),
    "xlm-roberta": lambda: (
        tf.XLMRobertaForSequenceClassification,
        tf.XLMRobertaConfig(**SIZES, pad_token_id=1, num_labels=1),
    ),
    "gte": lambda: (tf.GteForSequenceClassification, tf.GteConfig(**GTE, num_labels=3)),
    "modernbert": lambda: (
        tf.ModernBertForSequenceClassification,
        tf.ModernBertConfig(**MODERN, num_labels=1),
    ),
    "modernbert-mean": lambda: (
        tf.ModernBertForSequenceClassification,
        tf.ModernBertConfig(**MODERN, num_labels=2, classifier_pooling="mean"),
    ),
}


def saved(make, folder):
    torch.manual_seed(0)
    kind, config = make()
    theirs = kind(config).eval()
    for name, parameter in theirs.named_parameters():  # norms and biases start as ones and zeros
        if name.endswith("bias") or "norm" in name.lower():
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.1)
    theirs.save_pretrained(folder)
    return theirs


def sequences():
    return [torch.randint(3, 120, (n,)).tolist() for n in LENGTHS]


def close(got, want):
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= BOUND, error


@pytest.mark.parametrize("name", BASES)
@torch.inference_mode()
def test_hidden_states_equal_transformers(name, tmp_path):
    theirs = saved(BASES[name], tmp_path)
    ours = load_encoder(tmp_path, "float32").encoder
    texts = sequences()
    got = ours.hidden(pack(texts))
    want = torch.cat([theirs(torch.tensor([ids])).last_hidden_state[0] for ids in texts])
    close(got, want)
    ours.prepare_inference()
    assert torch.equal(ours.hidden(pack(texts)), got)


@pytest.mark.parametrize("name", HEADS)
@torch.inference_mode()
def test_classification_heads_equal_transformers(name, tmp_path):
    theirs = saved(HEADS[name], tmp_path)
    loaded = load_encoder(tmp_path, "float32")
    assert loaded.head is not None
    texts = sequences()
    batch = pack(texts)
    hidden = loaded.encoder.hidden(batch)
    kind = loaded.config.classifier_pooling
    got = loaded.head(ops.pool(hidden, batch.query_starts, kind))
    want = torch.cat([theirs(torch.tensor([ids])).logits for ids in texts])
    close(got, want)
    assert torch.equal(score_of(got, False), got[:, 0])


@torch.inference_mode()
def test_token_types_are_rows_of_the_place_table(tmp_path):
    theirs = saved(BASES["bert"], tmp_path)
    ours = load_encoder(tmp_path, "float32").encoder
    ids, types = sequences()[2], [0] * 9 + [1] * 8
    want = theirs(torch.tensor([ids]), token_type_ids=torch.tensor([types])).last_hidden_state[0]
    close(ours.hidden(pack([ids], [types], ours.config.num_positions)), want)


@torch.inference_mode()
@pytest.mark.parametrize("prefix", ["", "new."])
def test_checkpoints_under_the_authors_names_load(prefix, tmp_path):
    """GTE as published: q, k, v stacked, and up before gate."""
    import json

    from safetensors.torch import load_file, save_file

    theirs = saved(BASES["gte"], tmp_path)
    split = {f"{k}": v for k, v in theirs.state_dict().items()}
    stacked = {k: v for k, v in split.items() if not k.startswith(("layers.", "rotary"))}
    for i in range(3):
        own, old = f"layers.{i}.", f"encoder.layer.{i}."
        for leaf in ("weight", "bias"):
            parts = [split[f"{own}self_attn.{p}_proj.{leaf}"] for p in "qkv"]
            stacked[f"{old}attention.qkv_proj.{leaf}"] = torch.cat(parts)
            for new, was in (("attention.o_proj", "self_attn.o_proj"), ("mlp.down_proj",) * 2,
                             ("attn_ln", "post_attention_layernorm"),
                             ("mlp_ln", "post_mlp_layernorm")):  # fmt: skip
                stacked[f"{old}{new}.{leaf}"] = split[f"{own}{was}.{leaf}"]
        both = [split[f"{own}mlp.{p}_proj.weight"] for p in ("up", "gate")]
        stacked[f"{old}mlp.up_gate_proj.weight"] = torch.cat(both)
    for file in tmp_path.glob("*.safetensors"):
        assert load_file(file)
        file.unlink()
    named = {prefix + k: v.contiguous() for k, v in stacked.items()}
    save_file(named, str(tmp_path / "model.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["NewModel"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = load_encoder(tmp_path, "float32").encoder
    texts = sequences()
    want = torch.cat([theirs(torch.tensor([ids])).last_hidden_state[0] for ids in texts])
    close(ours.hidden(pack(texts)), want)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["bert", "gte", "modernbert"])
def test_a_text_does_not_depend_on_its_companions(name, dtype, tmp_path):
    if load_kernels().level != "cpu":
        pytest.skip("PyTorch's products depend on the number of rows")
    saved(BASES[name], tmp_path)
    ours = load_encoder(tmp_path, dtype).encoder
    ours.prepare_inference()
    texts = sequences() + sequences()
    batch = pack(texts)
    whole = ops.pool(ours.hidden(batch), batch.query_starts, "mean", True)
    for i, ids in enumerate(texts):
        alone = pack([ids])
        row = ops.pool(ours.hidden(alone), alone.query_starts, "mean", True)
        assert torch.equal(row[0], whole[i])
