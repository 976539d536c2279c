"""The parity certificate: it passes where training is right, and fails where it is not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers as tf

from sterna.core.errors import ConfigError, TrainError
from sterna.train import verify as verify_module
from sterna.train.adapter_config import AdapterConfig
from sterna.train.config import Recipe
from sterna.train.longseq.config import LongseqSection
from sterna.train.offload import weights as weights_module
from sterna.train.offload.config import OffloadSection
from sterna.train.trial import Row, Trial, compare, run_trial
from sterna.train.trialmodel import TrialModel
from sterna.train.verify import verify

SIZES = {
    "vocab_size": 700,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


@pytest.fixture
def folder(save_hf):
    torch.manual_seed(0)
    return save_hf(tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)))


def recipe_of(path, parallel, **model):
    values = {
        "model": {"path": str(path), **model},
        "data": {"sources": [{"path": "x.jsonl"}]},
        "parallel": parallel,
    }
    return Recipe.model_validate(values)


def test_each_feature_and_all_pass_and_are_written(folder, tmp_path):
    seen = []
    certificate = verify(recipe_of(folder, {"sp": 2, "dp": 1}), seen.append)
    certificate.save(tmp_path)
    assert certificate.is_passed, certificate.text()
    assert seen == ["trainer's step", "sequence over 2", "sharded weights", "all"]
    stored = json.loads((tmp_path / "parity.json").read_text())
    assert stored["is_passed"] and len(stored["checks"]) == 4
    assert stored["dtype"] == "float64" and stored["checks"][0]["errors"]["grad"] <= 1e-10
    assert (tmp_path / "parity.txt").read_text().endswith("PASSED\n")
    certificate.require()


def test_a_model_behind_transformers(folder):
    certificate = verify(recipe_of(folder, {"dp": 2}, backend="hf"))
    assert certificate.is_passed, certificate.text()
    assert certificate.dtype == "float32"


def test_long_rows_and_adapters_of_a_model_behind_transformers(folder):
    recipe = recipe_of(folder, {}, backend="hf").model_copy(
        update={"longseq": LongseqSection(auto=True), "adapter": AdapterConfig(kind="dora", rank=4)}
    )
    certificate = verify(recipe)
    assert certificate.is_passed, certificate.text()
    assert [check.feature for check in certificate.checks] == ["trainer's step", "long rows", "all"]
    assert "frugal end" in certificate.text()


def test_a_difference_fails_and_is_named(folder, monkeypatch):
    """The reference sees other targets than the spread trials: everything must fail."""
    plain = verify_module.run_trial
    other = (Row((5, 18, 14), drop=0.0), *verify_module.ROWS[1:])

    def run(trial):
        return plain(trial if trial.chunked_head else replace(trial, rows=other))

    monkeypatch.setattr(verify_module, "run_trial", run)
    certificate = verify(recipe_of(folder, {}))
    assert not certificate.is_passed
    assert "FAILED" in certificate.text()
    with pytest.raises(TrainError, match="trainer's step, all"):
        certificate.require()


def test_a_scale_that_adam_hides_is_seen_by_the_clipped_weights():
    """Gradients twice as large under clipping leave the direction, and are still an error."""
    model = TrialModel({**SIZES, "architectures": ["LlamaForCausalLM"]})
    trial = Trial((Row((30,)),), model, steps=1)
    reference = run_trial(trial)
    doubled = replace(reference, grads={n: 2 * g for n, g in reference.grads.items()})
    assert compare(reference, doubled).grad == pytest.approx(1.0)
    missing = replace(reference, grads={})
    assert compare(reference, missing).grad == 1.0


def test_under_torchrun_it_is_refused(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="without torchrun"):
        verify(recipe_of(folder, {}))


def test_what_is_not_covered_is_refused(folder):
    recipe = recipe_of(folder, {}, neftune_alpha=5.0)
    with pytest.raises(ConfigError, match="neftune_alpha"):
        verify(recipe)


def test_a_feature_that_cannot_run_is_a_failed_check(folder):
    """Of three ranks, two cannot exchange heads."""
    certificate = verify(recipe_of(folder, {"sp": 3, "ulysses": 2}))
    failed = {check.feature: check.failure for check in certificate.checks if not check.is_passed}
    assert "ulysses" in failed["sequence over 3"]


def test_an_adapter_is_compared_with_plain_training_of_the_adapter(folder):
    recipe = recipe_of(folder, {"sp": 2})
    adapter = AdapterConfig(rank=4, dropout=0.1, layers=(2,))
    long = recipe.longseq.model_copy(update={"checkpoint": True, "mlp_tile": 9})
    adapted = recipe.model_copy(update={"adapter": adapter, "longseq": long})
    certificate = verify(adapted)
    assert certificate.is_passed, certificate.text()
    names = [check.feature for check in certificate.checks]
    assert "long rows" in names
    assert "parts" in certificate.checks[0].errors.worst_grad  # adapters alone have gradients


OFFLOADED = {
    "longseq": LongseqSection(checkpoint=True),
    "offload": OffloadSection(states="disk", weights="disk"),
}


@pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=4)])
def test_offloaded_weights_and_states_are_compared(folder, tmp_path, adapter):
    recipe = recipe_of(folder, {}).model_copy(update=OFFLOADED | {"adapter": adapter})
    recipe = recipe.model_copy(
        update={"run": recipe.run.model_copy(update={"output": tmp_path / "run"})}
    )
    certificate = verify(recipe)
    assert certificate.is_passed, certificate.text()
    names = [check.feature for check in certificate.checks]
    assert names[-3:] == ["offloaded weights", "all", "offloaded states"]
    assert certificate.checks[-1].errors.worst == 0.0
    assert not list((tmp_path / "run").iterdir())  # their file has no name


def test_weights_that_come_back_wrong_are_seen(folder, tmp_path, monkeypatch):
    plain = weights_module.cut

    def shifted(piece, memory):
        return {name: tensor.roll(1) for name, tensor in plain(piece, memory).items()}

    monkeypatch.setattr(weights_module, "cut", shifted)
    recipe = recipe_of(folder, {}).model_copy(update=OFFLOADED)
    recipe = recipe.model_copy(
        update={"run": recipe.run.model_copy(update={"output": tmp_path / "run"})}
    )
    certificate = verify(recipe)
    failed = {check.feature for check in certificate.checks if not check.is_passed}
    assert failed == {"offloaded weights", "all"}
