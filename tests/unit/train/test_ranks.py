"""The same recipe on several ranks: the same losses and weights, resume, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sterna.model.load import load_model
from sterna.parallel.launch import LocalRanks

RUN = f"{Path(__file__).with_name('ranks.py')}:run"
BASE = {
    "data": {"held_out": 0.1},
    "eval": {"max_rows": 4},
    "optim": {"lr": 1e-3, "weight_decay": 0.1, "ema_decay": 0.5},
    "run": {"steps": 4, "rows_per_step": 4},
}
MESHES = {
    "dp2": (2, {"dp": 2}),
    "dp2-replicated": (2, {"dp": 2, "shard": "none"}),
    "sp2": (2, {"sp": 2}),
    "dp2-sp2": (4, {"dp": 2, "sp": 2}),
}


@pytest.fixture(scope="module")
def ranks():
    local = LocalRanks()
    yield local
    local.close()


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.recipe(tmp_path)  # the model and the chats
    return tmp_path


def weights(folder):
    decoder = load_model(folder / "model", "float32").decoder
    return {name: p.detach() for name, p in decoder.named_parameters()}


def sections(output, **parallel):
    return {**BASE, "run": {**BASE["run"], "output": str(output)}, "parallel": parallel}


def test_a_nan_on_one_rank_is_named_by_all(ranks, folder):
    """Rank 1 alone has a bad row: the second of the step, and both ranks say so."""
    spread = ranks.run(2, f"{RUN}_poisoned", str(folder), sections(folder / "bad", shard="none"), 1)
    assert [kind for kind, _ in spread] == ["NonFiniteError"] * 2
    assert all("step 1: loss nan in row 1 (" in message for _, message in spread)
    assert len({message.partition("; the step")[0] for _, message in spread}) == 1


@pytest.mark.parametrize("name", MESHES)
def test_ranks_change_nothing_but_rounding(ranks, folder, name):
    world, parallel = MESHES[name]
    alone = ranks.run(1, RUN, str(folder), sections(folder / "one"))[0]
    spread = ranks.run(world, RUN, str(folder), sections(folder / "many", **parallel))
    assert alone[:2] == ("done", 4)
    assert [found[:2] for found in spread] == [alone[:2]] * world
    for _, _, loss, eval_loss in spread:
        assert loss == pytest.approx(alone[2], rel=1e-5)
        assert eval_loss == pytest.approx(alone[3], rel=1e-5)
    one, many = weights(folder / "one"), weights(folder / "many")
    for key, value in one.items():
        # Adam's division turns a gradient's last digits into up to a hundredth of a step
        assert (value - many[key]).abs().max() < 0.02 * 4e-3, key


@pytest.mark.parametrize("name", ["dp2", "sp2"])
def test_ranks_resume_to_the_same_bits(ranks, folder, name):
    world, parallel = MESHES[name]
    ranks.run(world, RUN, str(folder), sections(folder / "whole", **parallel))
    settings = sections(folder / "parts", **parallel)
    first = ranks.run(world, RUN, str(folder), settings, False, 2)
    assert {found[:2] for found in first} == {("interrupted", 2)}
    second = ranks.run(world, RUN, str(folder), settings, True)
    assert {found[:2] for found in second} == {("done", 4)}
    whole, parts = weights(folder / "whole"), weights(folder / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_another_world_is_refused(ranks, folder):
    ranks.run(2, RUN, str(folder), sections(folder / "run"), False, 2)
    kind, message = ranks.run(1, RUN, str(folder), sections(folder / "run"), True)[0]
    assert kind == "CheckpointError"
    assert "written by dp 2 x sp 1 ranks, this run has dp 1 x sp 1" in message
    uneven = sections(folder / "odd", dp=2)
    uneven["run"]["rows_per_step"] = 3
    kind, message = ranks.run(2, RUN, str(folder), uneven)[0]
    assert kind == "ConfigError" and "3, which 2 data-parallel ranks cannot share" in message


def test_an_adapter_over_ranks_trains_as_on_one(ranks, folder):
    settings = {
        "adapter": {"rank": 4},
        "model": {"path": str(folder / "model"), "dtype": "bfloat16"},
    }
    alone = ranks.run(1, RUN, str(folder), {**sections(folder / "one"), **settings})[0]
    spread = ranks.run(2, RUN, str(folder), {**sections(folder / "many", dp=2), **settings})
    for outcome, steps, loss, _ in spread:
        assert (outcome, steps) == alone[:2] == ("done", 4)
        assert loss == pytest.approx(alone[2], rel=1e-2)  # bfloat16
    assert (folder / "many/adapter/adapter_model.safetensors").exists()
