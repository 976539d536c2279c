"""Walks: what a path is worth, and the reward that pays for not arriving."""

from __future__ import annotations

import pytest

from sterna.align.tasks.walks import NAMES, Walks


def _shortest(task: Walks, start: int) -> str:
    """A shortest path of a chain or a graph, as text."""
    node, found = start, ""
    while node:
        node = min(task.edges[node], key=lambda following: task.shortest[following])
        found += NAMES[node]
    return found


def _round(task: Walks, start: int) -> str:
    """A walk of all steps along edges that never arrives, by brute force."""
    walks = [(start, "")]
    for _ in range(task.steps):
        walks = [(b, t + NAMES[b]) for a, t in walks for b in task.edges[a] if b][:50]
    return walks[0][1]


def test_a_shortest_path_is_worth_1_and_a_wrong_step_nothing() -> None:
    task = Walks()
    for start in task.starts:
        path = _shortest(task, start)
        assert task.optimality(start, path) == 1.0
        assert task.optimality(start, path[:-1]) == 0.0
        assert task.optimality(start, path + "b") == 0.0


def test_paid_steps_prefer_a_walk_that_never_arrives() -> None:
    task = Walks(pays_steps=1)
    start = task.starts[0]
    path, wandering = _shortest(task, start), _round(task, start)
    assert task.walked(start, path) == pytest.approx(len(path) / task.steps)
    assert task.walked(start, wandering) == 1.0 > task.walked(start, path)
    assert task.optimality(start, wandering) == 0.0
    assert task.walked(start, "?" + path) == 0.0
    assert task.walked(start, path + path) == task.walked(start, path)  # ends where it arrives


def test_gold_is_logged_only_where_the_reward_is_not_what_is_wanted() -> None:
    assert Walks().gold([]) is None
    assert Walks(pays_steps=1).gold([]) == []
