"""Reward models, DPO and KTO through the one Trainer: exact beginnings, resume, what they learn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sterna.core.errors import ConfigError
from sterna.model.value import load_value_model
from sterna.parallel.launch import LocalRanks
from sterna.train.recipe import to_toml

LN2 = float(torch.tensor(0.5).log().neg())  # in float32, as the loss computes it
ADAPTER = {"rank": 4, "alpha": 8}


@pytest.mark.parametrize("reference", ["copy", "precomputed", "adapter"])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_first_step_is_exactly_where_the_reference_is(
    offline, own_home, tmp_path, reference, loss
):
    changes = {"adapter": ADAPTER} if reference == "adapter" else {}
    made = offline.recipe(
        tmp_path, preference={"reference": reference, "loss": loss}, run={"steps": 2}, **changes
    )
    offline.run(made)
    first, second = offline.lines(made)
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0.0
    wanted = LN2 if loss == "sigmoid" else (1 / (2 * 0.1)) ** 2
    assert first["loss"] == pytest.approx(wanted, rel=1e-7)
    assert second["rewards/margins"] != 0.0
    assert first["targets"] > 10  # pairs, not tokens
    assert {"logps/chosen", "logps/rejected", "rewards/accuracies"} <= first.keys()


def test_references_agree_and_kept_ones_are_read_back(offline, own_home, tmp_path):
    losses = {}
    for reference in ("copy", "precomputed", "precomputed "):
        made = offline.recipe(
            tmp_path, preference={"reference": reference.strip()},
            run={"output": str(tmp_path / reference.replace(" ", "-again"))},
        )  # fmt: skip
        offline.run(made)
        losses[reference] = [line["loss"] for line in offline.lines(made)]
    assert losses["copy"] == losses["precomputed"] == losses["precomputed "]
    assert len(list((own_home / "reference").iterdir())) == 1


def test_dpo_resumes_to_the_same_bits(offline, own_home, tmp_path):
    whole = offline.recipe(tmp_path, run={"output": str(tmp_path / "whole")})
    offline.run(whole)
    half = {"output": str(tmp_path / "half")}
    offline.run(offline.recipe(tmp_path, run={**half, "steps": 2}, schedule={"total_steps": 4}))
    again = offline.recipe(tmp_path, run=half, schedule={"total_steps": 4})
    offline.run(again, resume=True)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors")
                for name in ("whole", "half"))  # fmt: skip
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = offline.recipe(tmp_path, run={**half, "steps": 6}, model={"path": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"model\.path"):  # the reference would be another
        offline.run(other, resume=True)


def test_micro_batches_do_not_change_kto(offline, tmp_path):
    losses = []
    for micro in (1, 4):
        made = offline.recipe(
            tmp_path, "kto", run={"micro_rows": micro, "output": str(tmp_path / f"m{micro}")}
        )
        offline.run(made)
        losses.append([(x["loss"], x["grad_norm"], x["kl"]) for x in offline.lines(made)])
    assert losses[0][0][0] == 0.5 and losses[0][0][2] == 0.0  # 1 - sigmoid(0)
    assert any(kl > 0 for _, _, kl in losses[0]) or len(losses[0]) < 3
    for step, (one, many) in enumerate(zip(*losses, strict=True)):
        # Weights are equal at first; then AdamW's m / sqrt(v) carries float32's rounding on, and a
        # log-ratio is the difference of two sums of some hundred nats.
        assert one == pytest.approx(many, rel=1e-3 if step else 1e-6, abs=1e-4 if step else 1e-6)


def test_kto_learns_what_is_desirable(offline, tmp_path):
    made = offline.recipe(tmp_path, "kto", run={"steps": 25}, preference={"beta": 0.3})
    offline.run(made)
    last = offline.lines(made)[-1]
    assert last["rewards/margins"] > 1.0 and last["loss"] < 0.4


def test_dpo_raises_the_margin_of_pairs_it_has_not_seen(offline, tmp_path):
    made = offline.recipe(tmp_path, run={"steps": 25}, eval={"every": 25})
    offline.run(made)
    before, after = offline.lines(made, "eval")
    assert before["loss"] == pytest.approx(LN2, rel=1e-6)
    assert after["rewards/accuracies"] > 0.9 and after["rewards/margins"] > 0.5


@pytest.mark.parametrize("loss", ["last", "tokens"])
def test_a_reward_model_ranks_pairs_it_has_not_seen(offline, tmp_path, loss):
    made = offline.recipe(tmp_path, "reward")  # writes the files
    other = offline.write_pairs(tmp_path / "other.jsonl", 40, 5, letters="uvwxyz")
    made = offline.recipe(
        tmp_path, "reward", run={"steps": 25}, log={"report": True}, eval={"every": 25},
        reward={"loss": loss, "out_of_domain": {"sources": [{"path": str(other)}], "seq_len": 128}},
    )  # fmt: skip
    offline.run(made)
    before, after = offline.lines(made, "eval")
    assert before["loss"] == pytest.approx(LN2) and before["accuracy"] == 0.0
    assert after["accuracy"] > 0.9 and after["margin"] > 0.3 and 0 <= after["ece"] < 0.5
    last = json.loads((made.run.output / "reward.jsonl").read_text().splitlines()[-1])
    assert last["out_of_domain"]["pairs"] == 40 and last["out_of_domain"]["accuracy"] > 0.5
    assert sum(n for _, _, n in last["calibration"]) == pytest.approx(1.0)
    page = (made.run.output / "report.html").read_text()
    assert "Ranking of answers" in page and "out of domain" in page and "calibration" in page
    again = load_value_model(made.run.output / "model", "float32")
    assert again.score.any()


def test_a_reward_model_of_an_adapter_and_its_resume(offline, tmp_path):
    def go(name, steps, **options):
        made = offline.recipe(
            tmp_path, "reward", adapter=ADAPTER, schedule={"total_steps": 4},
            run={"output": str(tmp_path / name), "steps": steps},
        )  # fmt: skip
        offline.run(made, **options)
        return load_file(tmp_path / name / "model" / "model.safetensors")

    whole = go("whole", 4)
    go("half", 2)
    resumed = go("half", 4, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert whole["score.weight"].any()
    assert (tmp_path / "half" / "adapter" / "value_head.safetensors").exists()
    start = load_file(tmp_path / "model" / "model.safetensors")
    changed = [name for name in start if not torch.equal(start[name], whole[name])]
    assert changed and all("proj" in name for name in changed)


def test_a_reward_model_goes_on_from_a_reward_model(offline, tmp_path):
    offline.run(offline.recipe(tmp_path, "reward"))
    made = offline.recipe(
        tmp_path, "reward", model={"path": str(tmp_path / "run" / "model")},
        run={"output": str(tmp_path / "second"), "steps": 1},
    )  # fmt: skip
    offline.run(made)
    assert offline.lines(made)[0]["loss"] < LN2


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"neftune_alpha": 5}}, "neftune"),
        ({"longseq": {"checkpoint": True}, "model": {"backend": "hf"}}, "longseq"),
        ({"loss": {"z_loss": 1e-4}}, "loss"),
    ],
)
def test_what_is_not_proven_is_refused(offline, tmp_path, sections, words):
    with pytest.raises(ConfigError, match=words):
        offline.run(offline.recipe(tmp_path, **sections))


@pytest.mark.parametrize("adapter", [None, ADAPTER])
@pytest.mark.parametrize("kind", ["reward", "dpo", "kto"])
def test_checkpoints_change_no_bit_and_tiles_only_sums(offline, tmp_path, kind, adapter):
    """Blocks run again in the backward, with the adapter on, whatever the reference did between."""

    def go(name, **longseq):
        extra = {} if adapter is None else {"adapter": adapter}
        made = offline.recipe(
            tmp_path, kind, run={"output": str(tmp_path / name), "steps": 3}, longseq=longseq,
            **extra,
        )  # fmt: skip
        offline.run(made)
        return [(line["loss"], line["grad_norm"]) for line in offline.lines(made)]

    plain = go("plain")
    assert go("one", checkpoint=True) == plain
    assert go("two", checkpoint=True, every=2) == plain
    assert go("disk", checkpoint=True, tier="disk") == plain
    tiled = go("tiled", checkpoint=True, mlp_tile=32, attention_tile=32)
    for one, other in zip(tiled, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_recipes(offline, tmp_path):
    made = offline.recipe(tmp_path)
    assert made.data.rows == "pairs" and offline.recipe(tmp_path, "kto").data.rows == "labelled"
    assert 'kind = "dpo"' in to_toml(made)
    with pytest.raises(ConfigError, match="there is none"):
        offline.recipe(tmp_path, preference={"reference": "adapter"})
    with pytest.raises(ConfigError, match=r"unknown key .*preference\.betta.*preference\.beta"):
        offline.recipe(tmp_path, preference={"betta": 1})
    with pytest.raises(ConfigError, match="set by the kind"):
        offline.recipe(tmp_path, data={"rows": "labelled"})
    assert math.isclose(LN2, math.log(2), rel_tol=1e-7)


RANK = f"{Path(__file__).with_name('offline_kit.py')}:run_rank"


@pytest.fixture(scope="module")
def ranks():
    local = LocalRanks()
    yield local
    local.close()


@pytest.mark.parametrize("kind", ["reward", "dpo", "kto"])
def test_two_ranks_change_nothing_but_rounding(offline, ranks, own_home, tmp_path, kind):
    offline.recipe(tmp_path)  # the files
    # 11 pairs of a pass: the last step has a row for one rank alone, and the other a filler.
    few = tmp_path / "few.jsonl"
    few.write_text("".join((tmp_path / "pairs.jsonl").read_text().splitlines(True)[:11]))
    source = {"sources": [{"path": str(few)}], "packing": "none", "held_out": 0, "seq_len": 160}

    def sections(name, **parallel):
        run = {"output": str(tmp_path / name), "steps": 6, "rows_per_step": 2}
        return {"data": source, "run": run, "parallel": parallel,
                "preference": {"reference": "precomputed"}, "eval": {"data": source}}  # fmt: skip

    alone = ranks.run(1, RANK, str(tmp_path), kind, sections("one"))[0]
    spread = ranks.run(2, RANK, str(tmp_path), kind, sections("two", dp=2, shard="none"))
    assert spread[0] == spread[1] == pytest.approx(alone, rel=1e-3)
    one, two = (offline.lines(offline.recipe(tmp_path, kind, run={"output": str(tmp_path / n)}))
                for n in ("one", "two"))  # fmt: skip
    assert [line["targets"] for line in one] == [line["targets"] for line in two]
    first = [{k: v for k, v in lines[0].items() if "/" in k or k == "loss"} for lines in (one, two)]
    assert first[0] == pytest.approx(first[1], rel=1e-5, abs=1e-5)
    refused = ranks.run(2, RANK, str(tmp_path), kind, sections("cut", dp=2))
    assert {name for name, _ in refused} == {"ConfigError"} and "shard" in refused[0][1]
