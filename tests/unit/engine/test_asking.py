"""A drafter that takes more than it gives is asked less and less; one that pays always."""

from __future__ import annotations

from sterna.engine.asking import ASKS, MAX_PAUSE, PAUSE, Asking


def asked_in(asking, steps, seconds, gain):
    """Of `steps` steps of 1 s, how many asked for `seconds` and got `gain` seconds back."""
    count = 0
    for _ in range(steps):
        if asking.is_due():
            count += 1
            asking.note_ask(seconds, 1.0)
            asking.note_gain(gain)
    return count


def test_who_pays_is_always_asked():
    assert asked_in(Asking(), 1000, 0.1, 0.15) == 1000


def test_who_does_not_pay_costs_less_than_a_hundredth_in_the_end():
    asking = Asking()
    first = asked_in(asking, 10 * (ASKS + PAUSE), 0.1, 0.05)
    later = asked_in(asking, 20_000, 0.1, 0.05)
    assert first < 5 * (ASKS + PAUSE)
    assert later * 0.1 < 0.01 * 20_000
    assert asked_in(asking, 3 * MAX_PAUSE, 0.1, 0.05) > 0  # it gets another chance


def test_who_costs_nothing_is_asked_whatever_it_gives():
    assert asked_in(Asking(), 1000, 0.001, -0.1) == 1000


def test_after_a_change_of_work_it_is_asked_again():
    asking = Asking()
    asked_in(asking, 2000, 0.1, 0.0)
    asked_in(asking, 2 * MAX_PAUSE, 0.1, 0.3)
    assert asked_in(asking, 1000, 0.1, 0.3) == 1000
