"""The format task: what counts, and what is only a copy of the prompt's example."""

from __future__ import annotations

import numpy as np
import pytest

from sterna.align.reward import Sample
from sterna.align.rollout import Rollout
from sterna.align.tasks.format import Format

EMPTY = np.zeros(0, np.int32)


def sample(text, is_truncated=False):
    rollout = Rollout(
        0, 0, EMPTY, EMPTY, np.zeros(0, np.bool_), np.zeros(0, np.float32), 0, is_truncated
    )
    return Sample("", text, {"example": "stone"}, rollout)


CASES = {
    "<answer>plum</answer>": 1.0,
    "<answer>plum</answer>\n": 1.0,
    "<answer>Plum</answer>": 0.4,
    "A plum: <answer>plum</answer>": 0.3,
    "<answer>plum\n</answer>": 0.3,
    "<answer> </answer>": 0.4,
    "<answer>stone</answer>": 0.4,
    "": 0.1,
}


@pytest.mark.parametrize("text", CASES)
def test_all_rules_or_a_tenth_for_each(text):
    (reward,) = Format().reward([sample(text)])
    assert reward == pytest.approx(CASES[text])
    assert Format().gold([sample(text)]) == [float(CASES[text] == 1.0)]


def test_a_cut_answer_is_not_whole():
    assert Format().reward([sample("<answer>plum</answer>", True)]) == pytest.approx([0.4])


def test_a_copy_may_count_for_the_reward_and_never_for_gold():
    task, copy = Format(copies_count=True), sample("<answer>stone</answer>")
    assert task.reward([copy]) == [1.0]
    assert task.gold([copy]) == [0.0]
