"""Sums and differences: what is asked, what is right, and what is never trained."""

from __future__ import annotations

import re

import pytest

from sterna.align.tasks.arithmetic import Arithmetic

_TERMS = re.compile(r"(\d+)([+-])(\d+)=")


def _read(question: str) -> tuple[int, str, int]:
    found = _TERMS.fullmatch(question)
    assert found is not None
    return int(found[1]), found[2], int(found[3])


def _value(question: str) -> int:
    a, sign, b = _read(question)
    return a + b if sign == "+" else a - b


def test_answers_are_right_as_they_are_usually_written() -> None:
    task = Arithmetic(most=99)
    problems = [task.problem(i, 0, "train") for i in range(300)]
    assert all(answer == str(_value(question)) for question, answer in problems)
    assert any(answer.startswith("-") for _, answer in problems)


def test_ones_first_has_equal_widths_no_sign_and_answers_turned_round() -> None:
    task = Arithmetic(most=99, ones_first=1)
    for i in range(300):
        question, answer = task.problem(i, 0, "train")
        assert len(question) == 6
        assert answer[::-1] == str(_value(question))
        assert answer.isdigit()


@pytest.mark.parametrize("ones_first", [0, 1])
def test_no_pair_of_terms_is_in_both_parts_in_either_order(ones_first: int) -> None:
    task = Arithmetic(most=9, ones_first=ones_first)
    seen: dict[str, set[tuple[str, int, int]]] = {"train": set(), "eval": set()}
    for part, kept in (("train", seen["train"]), ("eval", seen["eval"])):
        for i in range(1000):
            a, sign, b = _read(task.problem(i, 3, "eval" if part == "eval" else "train")[0])
            kept.add((sign, min(a, b), max(a, b)))
    assert len(seen["train"]) > 80
    assert seen["eval"]
    assert not seen["train"] & seen["eval"]
