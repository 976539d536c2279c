"""Models behind transformers train as native ones do, and are saved as transformers wants them."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from sterna.core.errors import UnsupportedModelError
from sterna.train.loop import train
from sterna.train.metrics import read_metrics


def losses(folder):
    return [x["loss"] for x in read_metrics(folder / "metrics.jsonl") if x["kind"] == "step"]


def test_both_backends_learn_alike(tiny, tmp_path):
    found = {}
    for backend in ("native", "hf"):
        recipe = tiny.recipe(
            tmp_path,
            model={"backend": backend, "neftune_alpha": 5.0},
            run={"output": str(tmp_path / backend)},
        )
        train(recipe)
        found[backend] = losses(tmp_path / backend)
    assert found["hf"] == pytest.approx(found["native"], rel=1e-4)
    a, b = (
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / name / "model")
        for name in ("native", "hf")
    )
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert (x - y).abs().max() < 1e-3, name


def test_a_model_only_transformers_knows_trains_and_resumes(tiny, tmp_path):
    tiny.recipe(tmp_path)
    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=272, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    folder = tmp_path / "gpt2"
    tf.GPT2LMHeadModel(config).save_pretrained(folder)
    tiny.write_tokenizer(folder)
    model = {"path": str(folder)}
    first = tiny.recipe(tmp_path, model=model, run={"steps": 4}, schedule={"total_steps": 8})
    train(first)
    result = train(
        tiny.recipe(tmp_path, model=model, run={"steps": 8}, schedule={"total_steps": 8}),
        resume=True,
    )
    whole = tiny.recipe(
        tmp_path, model=model, run={"steps": 8, "output": str(tmp_path / "whole")},
        schedule={"total_steps": 8},
    )  # fmt: skip
    train(whole)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 1
    assert isinstance(tf.AutoModelForCausalLM.from_pretrained(result.model), tf.GPT2LMHeadModel)
    with pytest.raises(UnsupportedModelError, match="GPT2"):
        train(tiny.recipe(tmp_path, model={**model, "backend": "native"}, run={"output": "none"}))
