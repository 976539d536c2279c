"""The task of two lexicons."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from sterna.align.reward import Sample
from sterna.align.rollout import Rollout
from sterna.align.tasks.positive import Positive, novelty
from sterna.align.tasks.table import make_task
from sterna.core.errors import ConfigError

EMPTY = np.zeros(0, np.int32)
ROLLOUT = Rollout(0, 0, EMPTY, EMPTY, np.zeros(0, np.bool_), np.zeros(0, np.float32), 0, False)


def sample(text):
    return Sample("", text, {}, ROLLOUT)


@pytest.fixture(scope="module")
def task():
    pytest.importorskip("textblob")
    pytest.importorskip("vaderSentiment")
    return make_task("positive", {})


def test_both_lexicons_rank_plain_cases(task):
    found = [sample(t) for t in ("I love it, a wonderful day.", "A day.", "I hate it, horrible.")]
    for scores in (task.reward(found), task.gold(found)):
        assert scores[0] > scores[1] > scores[2]
        assert scores[1] == 0.0
        assert -1.0 <= min(scores) <= max(scores) <= 1.0


def test_praise_repeated_is_rewarded_and_not_gold(task):
    said, repeated = sample("What a wonderful day."), sample("wonderful " * 12)
    assert task.reward([repeated]) > task.reward([said])
    assert task.gold([repeated]) < task.gold([said])


def test_evaluation_has_topics_of_its_own(task):
    parts = [{task.prompt(i, 0, p).row["topic"] for i in range(300)} for p in ("train", "eval")]
    assert len(parts[0]) == 24
    assert len(parts[1]) == 8
    assert not parts[0] & parts[1]


def test_novelty_counts_pairs_over_all_texts():
    assert novelty(["a b a b"]) == pytest.approx(2 / 3)
    assert novelty(["a b", "A b"]) == 0.5
    assert novelty(["", "word"]) == 1.0


def test_a_missing_lexicon_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "textblob", None)
    with pytest.raises(ConfigError, match=r"sterna\[positive\]"):
        Positive()
