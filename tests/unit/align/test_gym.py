"""Puzzles of reasoning-gym, scored by their own verifiers."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
from tests.unit.align.runs import recipe

from sterna.align.rl import align_rl
from sterna.align.tasks.gym import final_answer
from sterna.align.tasks.table import make_task
from sterna.core.errors import ConfigError

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None,
    reason="the package reasoning-gym is not installed (pip install reasoning-gym)",
)


def sample(row, text):
    return SimpleNamespace(row=row, answer=text)


def test_the_answer_is_in_the_last_pair_of_tags():
    assert final_answer("<answer>1</answer> no, <answer> 2 </answer>.") == "2"
    assert final_answer("<answer>1") is None
    assert final_answer("1</answer>") is None


def test_without_the_package_the_run_is_refused_with_a_hint(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match="pip install reasoning-gym"):
        make_task("reasoning-gym", {})


@needs_package
def test_puzzles_are_scored_by_their_verifier():
    task = make_task("reasoning-gym", {"dataset": "chain_sum", "max_terms": 3})
    rows = [task.prompt(i, 0, "train") for i in range(20)]
    assert len({row.prompt[0]["content"] for row in rows}) > 15
    assert rows[3] == task.prompt(3, 0, "train")
    assert rows[3] != task.prompt(3, 0, "eval")
    assert rows[3] != task.prompt(3, 1, "train")
    right = f"so <answer>{rows[0].row['entry']['answer']}</answer>"
    texts = [right, "<answer>x</answer>", rows[0].row["entry"]["answer"]]
    scores = task.reward([sample(rows[0].row, text) for text in texts])
    assert scores[0] == 1.0
    assert scores[1] < 0.1
    assert scores[2] == 0.0


@needs_package
def test_several_data_sets_take_turns_and_wrong_ones_are_named():
    task = make_task("reasoning-gym", {"dataset": "chain_sum, leg_counting"})
    assert [task.prompt(i, 0, "train").row["dataset"] for i in range(3)] == [
        "chain_sum", "leg_counting", "chain_sum",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="did you mean 'chain_sum'"):
        make_task("reasoning-gym", {"dataset": "chain_sums"})
    with pytest.raises(ConfigError, match="no_such"):
        make_task("reasoning-gym", {"dataset": "chain_sum", "no_such": 1})


@needs_package
def test_a_run_logs_its_reward(tmp_path):
    prompts = {"task": "reasoning-gym", "options": {"max_terms": 2}, "max_tokens": 200}
    result = align_rl(recipe(tmp_path, prompts=prompts, run={"steps": 1}))
    assert result.reward == 0.0
