"""Runs behind transformers with adapters and long rows: learn, resume, merge, over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from sterna.cli.merge import merge
from sterna.parallel.launch import LocalRanks
from sterna.parallel.mesh import Mesh
from sterna.train.hooks import Hook
from sterna.train.loop import train
from sterna.train.metrics import read_metrics
from sterna.train.sft import Sft
from sterna.train.spread import use_longseq

RUN = f"{Path(__file__).with_name('ranks.py')}:run"
LONG = {"checkpoint": True, "mlp_tile": 40, "attention_tile": 50, "every": 2, "tier": "disk"}
NEOX = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


class StopAfter(Hook):
    def __init__(self, step):
        self.step = step

    def after_step(self, trainer, stats):
        if stats.step == self.step:
            trainer.stop("interrupted")


@pytest.fixture
def neox(tiny, tmp_path):
    """A model without a native family, with the tiny tokenizer."""
    tiny.recipe(tmp_path)  # the chats
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tf.GPTNeoXConfig(**NEOX))
    model.save_pretrained(tmp_path / "neox")
    tiny.write_tokenizer(tmp_path / "neox")
    return tmp_path / "neox"


def losses(folder):
    return [x["loss"] for x in read_metrics(folder / "metrics.jsonl") if x["kind"] == "step"]


@pytest.mark.parametrize("weights", ["auto", "fp6"])
def test_an_adapter_on_long_rows_learns_resumes_and_merges(tiny, tmp_path, neox, weights):
    recipe = tiny.recipe(
        tmp_path, model={"path": str(neox), "weights": weights}, run={"steps": 5},
        adapter={"rank": 8, "alpha": 16.0, "dropout": 0.1}, longseq=LONG, optim={"lr": 2e-2},
    )  # fmt: skip
    result = train(recipe)
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 0.1
    parts = recipe.model_copy(
        update={"run": recipe.run.model_copy(update={"output": tmp_path / "parts"})}
    )
    train(parts, hooks=[StopAfter(3)])
    train(parts, resume=True)
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        first, second = load_file(tmp_path / "run" / name), load_file(tmp_path / "parts" / name)
        assert all(torch.equal(first[key], second[key]) for key in first), name
    again = tf.AutoModelForCausalLM.from_pretrained(result.model)
    assert again.config.model_type == "gpt_neox"
    if weights == "auto":
        out = tmp_path / "merged"
        merge(str(neox), tmp_path / "run/adapter", output=out, dtype="float32")
        merged = tf.AutoModelForCausalLM.from_pretrained(out)
        for (key, a), b in zip(again.named_parameters(), merged.parameters(), strict=True):
            assert torch.equal(a, b), key


def test_long_rows_change_no_loss(tiny, tmp_path, neox):
    found = []
    for name, longseq in (("plain", {}), ("long", LONG)):
        recipe = tiny.recipe(
            tmp_path, model={"path": str(neox)}, longseq=longseq,
            run={"steps": 3, "output": str(tmp_path / name)},
        )  # fmt: skip
        train(recipe)
        found.append(losses(tmp_path / name))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_an_adapter_over_ranks_trains_as_on_one(tiny, tmp_path, neox):
    longseq = {"checkpoint": True, "mlp_tile": 30, "attention_tile": 40}
    base = {"model": {"path": str(neox)}, "adapter": {"rank": 4}, "longseq": longseq}
    runs = {}
    with LocalRanks() as ranks:
        for world, name in ((1, "one"), (2, "many")):
            run = {"steps": 3, "rows_per_step": 4, "output": str(tmp_path / name)}
            sections = {**base, "run": run, "parallel": {"dp": world}}
            runs[name] = ranks.run(world, RUN, str(tmp_path), sections)
    assert all(found[:2] == ("done", 3) for found in (*runs["one"], *runs["many"])), runs
    assert runs["many"][0][2] == pytest.approx(runs["one"][0][2], rel=1e-5)
    first, second = (load_file(tmp_path / n / "model/model.safetensors") for n in ("one", "many"))
    for key, value in first.items():
        assert (second[key] - value).abs().max() <= 1e-4, key


def test_auto_chooses_for_a_foreign_model(tiny, tmp_path, neox, monkeypatch):
    recipe = tiny.recipe(tmp_path, model={"path": str(neox)}, longseq={"auto": True})
    monkeypatch.setattr("sterna.train.autoplan.free_memory", lambda device: 0.0)
    model = Sft().build(recipe, Mesh.single(), None)
    use_longseq(model, recipe, Mesh.single(), 1)
    assert all("forward" in vars(layer) for layer in model.layers)
