"""The alarm of reward hacking, on made-up curves."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sterna.align.auditor import GOLD, WINDOW, Auditor
from sterna.align.experience import Experience
from sterna.align.figures import completion_figures, group_figures
from sterna.align.flat import layout_of
from sterna.align.reward import Rewards
from sterna.align.rollout import Rollout


def curve(rise, gold, steps=24, **extra):
    """Figures of steps whose reward and gold move by so much a step, with noise of 0.05."""
    chance = random.Random(0)
    for step in range(1, steps + 1):
        yield (
            step,
            {
                "reward": rise * step + chance.gauss(0, 0.05),
                GOLD: gold * step + chance.gauss(0, 0.05),
                "completions/clipped_ratio": 0.0,
                "completions/distinct_2": 0.8,
                **extra,
            },
        )


def run(folder, figures, write=True):
    auditor = Auditor(folder)
    auditor.on_start(SimpleNamespace(counters=SimpleNamespace(step=1000)))
    for step, found in figures:
        if write:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"kind": "step", "step": step, **found}) + "\n")
        auditor.after_step(None, step, found, None)
    return auditor


def steps(auditor):
    return [alarm.step for alarm in auditor.alarms]


def alarms(folder):
    return [json.loads(line) for line in (folder / "alarms.jsonl").read_text().splitlines()]


def test_reward_up_and_gold_down_is_an_alarm_once_in_a_window(tmp_path):
    auditor = run(tmp_path, curve(0.02, -0.02))
    assert [alarm.step for alarm in auditor.alarms] == [2 * WINDOW, 3 * WINDOW]
    first, second = alarms(tmp_path)
    assert (first["step"], second["step"]) == (16, 24)
    assert first["reward"] > 1
    assert first["gold"] < -1


@pytest.mark.parametrize(("rise", "gold"), [(0.02, 0.02), (0.02, 0.0), (-0.02, -0.02), (0.0, 0.0)])
def test_no_alarm_where_they_do_not_part(tmp_path, rise, gold):
    assert run(tmp_path, curve(rise, gold)).alarms == []


def test_a_resumed_run_gives_the_same_alarms(tmp_path):
    figures = list(curve(0.02, -0.02))
    run(tmp_path, figures[:14])
    assert steps(run(tmp_path, figures[14:])) == [16, 24]
    run(tmp_path, [])
    assert [line["step"] for line in alarms(tmp_path)] == [16, 24]
    assert steps(run(tmp_path, [])) == [16, 24]


def test_completions_that_become_alike_are_warned_of_once(tmp_path, caplog):
    figures = list(curve(0.0, 0.0))
    figures[12:] = [(s, {**f, "completions/distinct_2": 0.3}) for s, f in figures[12:]]
    with caplog.at_level(logging.WARNING, "sterna"):
        run(tmp_path, figures)
    assert [m for m in caplog.messages if "become alike" in m] == [caplog.messages[0]]
    assert caplog.messages[0].startswith("step 13: ")


def rollout(tokens, prompt_idx=0):
    size = len(tokens)
    return Rollout(
        prompt_idx, 0, np.array([1], np.int32), np.array(tokens, np.int32),
        np.ones(size, np.bool_), np.zeros(size, np.float32), 0, False,
    )  # fmt: skip


def test_distinct_pairs_are_counted_over_the_whole_step():
    drawn = [rollout([1, 2, 1, 2]), rollout([1, 2]), rollout([3])]  # 12 21 12 12: two of four
    assert completion_figures(drawn)["completions/distinct_2"] == 0.5
    assert completion_figures([rollout([3])])["completions/distinct_2"] == 1.0


def test_groups_of_one_have_no_share_without_spread():
    zeros = torch.zeros(2)
    layout = layout_of([1, 1], torch.ones(2, dtype=torch.bool))
    rewards = Rewards(zeros.double(), {}, torch.ones(2, dtype=torch.bool))
    alone = Experience(
        (rollout([1], 0), rollout([2], 1)), layout, rewards, zeros, zeros, zeros, None, None, None,
        zeros,
    )  # fmt: skip
    assert group_figures(alone) == {}
    both = replace(alone, rollouts=(rollout([1]), rollout([2])))
    assert group_figures(both) == {"frac_reward_zero_std": 1.0}
    spread = replace(both, scores=torch.tensor([0.0, 1.0]))
    assert group_figures(spread) == {"frac_reward_zero_std": 0.0}
