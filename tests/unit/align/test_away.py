"""Frozen models in a tier say what they say in memory, to the bit, and leave no memory behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.align.runs import Low, recipe, tiny

from sterna.align.build import build
from sterna.align.config import RlRecipe
from sterna.align.memory.away import Away, Frozen
from sterna.align.rl import align_rl
from sterna.align.rollout import Rollout
from sterna.align.score import completion_logprobs
from sterna.core.errors import ConfigError, UnsupportedModelError
from sterna.model.load import load_model
from sterna.model.value import ValueModel, save_value_model
from sterna.train.metrics import read_metrics

TIMES = ("time", "seconds", "per_s")


def rollouts(lengths):
    draw = np.random.default_rng(5)
    return [
        Rollout(
            prompt_idx=i, sample_idx=0, prompt=draw.integers(3, 250, 4).astype(np.int32),
            completion=draw.integers(3, 250, n).astype(np.int32), mask=np.ones(n, np.bool_),
            logprobs=np.zeros(n, np.float32), policy_version=0, is_truncated=False,
        )
        for i, n in enumerate(lengths)
    ]  # fmt: skip


def reward_folder(folder: Path) -> Path:
    """A value model of the tiny Llama with a score that is not zero."""
    tiny.write_model(folder / "model")
    model = ValueModel(load_model(folder / "model", "float32").decoder)
    torch.nn.init.normal_(model.score, generator=torch.Generator().manual_seed(3))
    save_value_model(model, folder / "judge")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / "model" / name).exists():
            (folder / "judge" / name).write_bytes((folder / "model" / name).read_bytes())
    return folder / "judge"


def file_maps() -> list[range]:
    """Address ranges of this process that are shared maps of files without a name."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "(deleted)" in line and line.split()[1] == "rw-s":
            begin, end = line.split()[0].split("-")
            found.append(range(int(begin, 16), int(end, 16)))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_on_disk_scores_as_in_memory(tmp_path, dtype):
    tiny.write_model(tmp_path / "model")
    kept = load_model(tmp_path / "model", dtype).decoder.requires_grad_(False)
    gone = load_model(tmp_path / "model", dtype).decoder.requires_grad_(False)
    asked = rollouts([5, 1, 9])
    with torch.no_grad():
        expected = completion_logprobs(kept, asked)
        away = Away(gone, "disk", tmp_path)
        for _ in range(2):  # and once more, after its memory was given back
            with away.here():
                found = completion_logprobs(gone, asked)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_between_two_askings_the_weights_are_in_the_file_alone(tmp_path):
    tiny.write_model(tmp_path / "model")
    model = load_model(tmp_path / "model", "float32").decoder.requires_grad_(False)
    away = Away(model, "disk", tmp_path)
    with away.here(), torch.no_grad():
        completion_logprobs(model, rollouts([3]))
        assert away._blocks._buffers
    assert not away._blocks._buffers
    maps = file_maps()
    large = [p for p in model.parameters() if p.numel() >= 4096]
    assert large
    assert all(any(p.data_ptr() in one for one in maps) for p in large)


def test_runs_with_models_away_are_the_same_to_the_bit(tmp_path):
    judge = reward_folder(tmp_path)
    common = {
        "algorithm": {"kind": "ppo", "kl_coef": 0.1},
        "rewards": [{"kind": "model", "path": str(judge)}],
    }

    def metrics(name: str, **memory: str) -> list[dict[str, float]]:
        run = recipe(tmp_path, **common, memory=memory, run={"output": str(tmp_path / name)})
        align_rl(run)
        lines = list(read_metrics(tmp_path / name / "metrics.jsonl"))
        return [{k: v for k, v in line.items() if not any(t in k for t in TIMES)}
                for line in lines]  # fmt: skip

    here, away = metrics("here"), metrics("away", reference="disk", rewards="disk")
    differ = {k for one, two in zip(here, away, strict=True) for k in one if one[k] != two[k]}
    assert len(here) == 3 and not differ


@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_a_teacher_on_disk_teaches_the_same(tmp_path, loss):
    recipe(tmp_path)

    def norm(name: str, tier: str) -> list[float]:
        run = recipe(
            tmp_path, algorithm={"kind": "distill"}, memory={"reference": tier},
            distill={"teacher": str(tmp_path / "model"), "loss": loss},
            run={"output": str(tmp_path / name), "steps": 2},
        )  # fmt: skip
        align_rl(run)
        return [line["grad_norm"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]

    assert norm("here", "memory") == norm("away", "disk")


def test_tiers_without_a_model_are_refused(tmp_path):
    for memory, words in (({"reference": "disk"}, "holds no such model"),
                          ({"rewards": "disk"}, "holds no such model"),
                          ({"rewards": "host"}, "the model is on the CPU")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            build(recipe(tmp_path, memory=memory), rewards=[Low()])


def test_a_reference_on_the_policys_base_cannot_go_away(tmp_path):
    run = recipe(tmp_path, adapter={"rank": 4}, algorithm={"kind": "grpo", "kl_coef": 0.1},
                 memory={"reference": "disk"})  # fmt: skip
    with pytest.raises(ConfigError, match="adapter of the policy's base"):
        build(run, rewards=[Low()])


def test_no_room_on_the_disk_names_the_setting(tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    tiny.write_model(tmp_path / "model")
    model = load_model(tmp_path / "model", "float32").decoder
    monkeypatch.setattr("sterna.train.offload.slab.os.posix_fallocate", full)
    with pytest.raises(Exception, match=r"memory\.folder to another disk"):
        Frozen.of(model, RlRecipe.model_validate(
            {"prompts": {"task": "length"}, "memory": {"folder": tmp_path}}), "disk")  # fmt: skip


def test_swiftkv_is_refused(tmp_path, monkeypatch):
    tiny.write_model(tmp_path / "model")
    model = load_model(tmp_path / "model", "float32").decoder
    object.__setattr__(model.config, "swiftkv", object())
    with pytest.raises(UnsupportedModelError, match="one by one"):
        Away(model, "disk", tmp_path)
