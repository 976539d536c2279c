"""The three steps on two gloo ranks: one set of books, the models of one process but for sums."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import pipeline_kit as kit

from sterna.align.pipeline.config import AlignRecipe
from sterna.align.pipeline.run import align_pipeline
from sterna.parallel.launch import LocalRanks
from sterna.train.metrics import read_metrics
from sterna.train.recipe import make_recipe, merge_into

HERE = str(Path(__file__).resolve())
STEPS = {
    "compare": {"prompts": 4},
    "run": {"threads": 1},
    "sft": {"run": {"steps": 2}, "checkpoint": {"every": 0}},
    "reward": {"run": {"steps": 2}, "checkpoint": {"every": 0}},
    "rl": {
        "rollout": {"prompts_per_step": 2, "group_size": 2},
        "run": {"steps": 2},
        "checkpoint": {"every": 0},
    },
}


def recipe(folder: Path, output: str, **changed: object) -> AlignRecipe:
    values = kit.values(folder)
    merge_into(values, STEPS)
    merge_into(values, {"run": {"output": output}})
    merge_into(values, changed)
    return make_recipe(values, AlignRecipe)


def run(folder, output, resume=False, **changed):
    """On every rank."""
    result = align_pipeline(recipe(Path(folder), output, **changed), resume=resume)
    table = result.table
    return result.outcome, result.step, None if table is None else table.reward_accuracy


@pytest.mark.timeout(300)
def test_two_ranks_run_the_steps_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    kit.write_task(tmp_path, pairs=200)
    with LocalRanks() as ranks:
        found = {}
        for world in (1, 2):
            output = str(tmp_path / f"run{world}")
            found[world] = ranks.run(world, f"{HERE}:run", str(tmp_path), output)
            assert [one[:2] for one in found[world]] == [("done", "rl")] * world
        assert found[2][0] == found[2][1]
        # A finished run is kept, by both ranks alike.
        again = ranks.run(2, f"{HERE}:run", str(tmp_path), str(tmp_path / "run2"), True)
        assert again == found[2]
    for step, keys in (("1-sft", ("loss", "grad_norm")), ("2-reward", ("loss", "grad_norm")),
                       ("3-rl", ("num_tokens",))):  # fmt: skip
        first = [next(read_metrics(tmp_path / f"run{w}" / step / "metrics.jsonl")) for w in (1, 2)]
        for key in keys:  # of the first step, before any rounding was carried on
            assert first[0][key] == pytest.approx(first[1][key], rel=2e-3)
