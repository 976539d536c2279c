"""Value models against transformers' sequence classification: one folder, both read it alike."""

from __future__ import annotations

import json

import pytest
import torch

from sterna.core.errors import ModelFileError, UnsupportedModelError
from sterna.kernels.load import load_kernels
from sterna.model.batch import Batch
from sterna.model.config import parse_config
from sterna.model.decoder import Decoder
from sterna.model.load import load_model
from sterna.model.save import save_model
from sterna.model.value import ValueModel, is_value_folder, load_value_model, save_value_model

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "phi3": ("Phi3ForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "gemma3_text": ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 8, "sliding_window": 24,
                    "layer_types": ["full_attention", "sliding_attention"],
                    "hidden_activation": "gelu_pytorch_tanh"}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 48, "hidden_act": "relu", "word_embed_proj_dim": 32,
            "head_dim": None,
            "num_key_value_heads": 4, "tie_word_embeddings": True}),
}  # fmt: skip


def new_decoder(family):
    load_kernels()
    architecture, changes = FAMILIES[family]
    values = {"architectures": [architecture], "model_type": family, **SIZES, **changes}
    decoder = Decoder(parse_config(values, family), torch.float32)
    draw = torch.Generator().manual_seed(0)
    for p in decoder.parameters():
        p.data.copy_(torch.randn(p.shape, generator=draw) * 0.2)
    return decoder


def with_score(model):
    draw = torch.Generator().manual_seed(1)
    model.score.data.copy_(torch.randn(model.score.shape, generator=draw))
    return model


def flat(*sequences):
    lengths = torch.tensor([len(s) for s in sequences], dtype=torch.int32)
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    tokens = torch.tensor([t for s in sequences for t in s], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths]).int()
    return Batch(tokens, positions, starts, lengths)


SEQUENCES = ([5, 9, 3, 77, 0], [11, 2], [42, 42, 8, 1, 90, 33, 7, 0])


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_the_same_score_at_the_last_token(family, tmp_path):
    model = with_score(ValueModel(new_decoder(family)))
    save_value_model(model, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    batch = flat(*SEQUENCES)
    with torch.no_grad():
        ours = model.values(batch)[batch.query_starts[1:].long() - 1]
        # EOS is the pad id here, and yet the last token's score is the one that both give.
        wanted = [float(theirs(torch.tensor([s])).logits) for s in SEQUENCES]
    assert ours.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    again = load_value_model(tmp_path, "float32")
    assert is_value_folder(tmp_path) and torch.equal(again.values(batch), model.values(batch))
    if family in ("llama", "opt"):
        other = load_value_model(tmp_path, "float32", backend="hf")
        assert torch.allclose(other.values(batch), model.values(batch), atol=1e-5)


def test_a_trunk_without_a_native_family(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "lm")
    model = with_score(load_value_model(tmp_path / "lm", "float32", backend="hf"))
    save_value_model(model, tmp_path / "rm")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    with torch.no_grad():
        ours = model.values(flat(SEQUENCES[0]))[-1]
        assert float(ours) == pytest.approx(
            float(theirs(torch.tensor([SEQUENCES[0]])).logits), rel=1e-5
        )
    again = load_value_model(tmp_path / "rm", "float32", backend="hf")
    assert torch.equal(again.score, model.score)


def test_a_language_model_gets_a_fresh_score_and_gradients_reach_everything(tmp_path):
    save_model(new_decoder("llama"), tmp_path)
    model = load_value_model(tmp_path, "float32")
    assert not model.score.any()
    with_score(model)
    assert "trunk.lm_head.weight" not in dict(model.named_parameters())
    model.values(flat(*SEQUENCES)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_bad_folders_are_named(tmp_path):
    save_value_model(ValueModel(new_decoder("llama")), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(UnsupportedModelError, match="2 labels"):
        load_value_model(tmp_path)
    unknown = {**values, "architectures": ["BertForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(unknown))
    with pytest.raises(UnsupportedModelError, match="no native family"):
        load_value_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelFileError, match="not valid JSON"):
        load_value_model(tmp_path)
    with pytest.raises(UnsupportedModelError):
        (tmp_path / "config.json").write_text(json.dumps(values))
        load_model(tmp_path)  # nothing is generated from a reward model by mistake
