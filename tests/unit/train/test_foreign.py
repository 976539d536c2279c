"""Models behind transformers through the trainer: as asked, or since no native family has them."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from sterna.model.hf import HFDecoder
from sterna.parallel.mesh import Mesh
from sterna.train.loop import train
from sterna.train.sft import Sft


def test_the_same_losses_as_the_native_decoder(tiny, tmp_path):
    losses = []
    for backend in ("native", "hf"):
        run = {"steps": 3, "output": str(tmp_path / backend)}
        recipe = tiny.recipe(tmp_path, model={"backend": backend}, run=run)
        losses.append(train(recipe).loss)
        assert (tmp_path / backend / "model" / "model.safetensors").exists()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    saved = [
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / b / "model") for b in ("native", "hf")
    ]
    pairs = zip(*(model.named_parameters() for model in saved), strict=True)
    assert all((a - b).abs().max() < 1e-3 for (_, a), (_, b) in pairs)


def test_an_architecture_without_a_family_runs_behind_transformers(tiny, tmp_path):
    tiny.recipe(tmp_path)
    torch.manual_seed(0)
    config = tf.GPTNeoXConfig(
        vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "neox")
    tiny.write_tokenizer(tmp_path / "neox")
    recipe = tiny.recipe(tmp_path, model={"path": str(tmp_path / "neox")}, run={"steps": 2})
    assert isinstance(Sft().build(recipe, Mesh.single(), None), HFDecoder)
    result = train(recipe)
    assert result.steps == 2
    again = tf.AutoModelForCausalLM.from_pretrained(result.model)
    assert again.config.model_type == "gpt_neox"
