"""Runs that train an adapter: what is saved, resumed and merged, over plain and quantised bases."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from sterna.core.errors import ConfigError
from sterna.model.load import load_model
from sterna.train import checkpoint
from sterna.train.adapter import merge_adapter
from sterna.train.adapter_file import load_adapter
from sterna.train.hooks import Hook
from sterna.train.loop import train
from sterna.train.metrics import read_metrics


class StopAfter(Hook):
    def __init__(self, step):
        self.step = step

    def after_step(self, trainer, stats):
        if stats.step == self.step:
            trainer.stop("interrupted")


def losses(folder):
    return [x["loss"] for x in read_metrics(folder / "metrics.jsonl") if x["kind"] == "step"]


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("weights", ["auto", "fp6"])
def test_an_adapter_learns_resumes_and_merges(tiny, tmp_path, kind, weights):
    # fp6 tiles want inputs that are multiples of 64
    folder = tiny.write_model(tmp_path / "base", hidden_size=64, intermediate_size=128)
    tiny.recipe(tmp_path)
    adapter = {"kind": kind, "rank": 8, "alpha": 16.0}
    model = {"path": str(folder), "weights": weights}
    recipe = tiny.recipe(
        tmp_path, model=model, adapter=adapter, run={"steps": 8}, optim={"lr": 2e-2}
    )
    result = train(recipe)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.2
    peft = json.loads((result.checkpoint / "adapter_config.json").read_text())
    assert peft["r"] == 8 and peft["base_model_name_or_path"] == str(folder)
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    assert not (result.checkpoint / "model.safetensors").exists()

    parts = recipe.model_copy(
        update={"run": recipe.run.model_copy(update={"output": tmp_path / "parts"})}
    )
    train(parts, hooks=[StopAfter(3)])
    train(parts, resume=True)
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        first, second = load_file(tmp_path / "run" / name), load_file(tmp_path / "parts" / name)
        assert all(torch.equal(first[key], second[key]) for key in first), name
    if weights == "auto":
        decoder = load_model(folder, "float32").decoder
        load_adapter(decoder, tmp_path / "run/adapter")
        merge_adapter(decoder)
        merged = load_model(result.model, "float32").decoder
        for (key, a), (_, b) in zip(
            decoder.named_parameters(), merged.named_parameters(), strict=True
        ):
            assert torch.equal(a, b), key


def test_the_base_of_an_adapter_may_not_change(tiny, tmp_path):
    train(tiny.recipe(tmp_path, adapter={"rank": 2}, run={"steps": 1}))
    other = tiny.write_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"model\.path"):
        train(tiny.recipe(tmp_path, adapter={"rank": 2}, model={"path": str(other)}), resume=True)
    assert checkpoint.newest(tmp_path / "run/checkpoints").name == "step-00000001"


def test_settings_that_contradict_an_adapter_are_refused(tiny, tmp_path):
    tiny.recipe(tmp_path)
    model = {
        "path": "", "config": str(tmp_path / "model/config.json"),
        "tokenizer": str(tmp_path / "model"),
    }  # fmt: skip
    with pytest.raises(ConfigError, match="adapts an existing model"):
        train(tiny.recipe(tmp_path, kind="pretrain", model=model, adapter={"rank": 2}))
