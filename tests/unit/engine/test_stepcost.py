"""What a step costs: measured on machines that lie, kept, corrected by real steps. A fake clock."""

from __future__ import annotations

import random

import pytest

from sterna.engine import costfile
from sterna.engine.costfile import (
    LIMIT_S,
    LONGEST_S,
    MAX_STARTS,
    load,
    measure,
    review,
    save,
    tuned,
)
from sterna.engine.stepcost import CLIP, KNOWN, CostPoint, StepCost

# Like a small model on two cores: weights are read in 2 ms, a row costs 0.25 ms, a key 0.5 us.
COST = StepCost([CostPoint(n, 2e-3 + 2.5e-4 * n, 5e-7 * n) for n in (1, 64)])


class Machine:
    """A clock that runs while it computes. `noise(seconds so far)` is a factor, 1 or more."""

    def __init__(self, monkeypatch, noise=lambda now: 1.0, cost=COST):
        self.now, self.num_runs = 0.0, 0
        self.noise, self.cost = noise, StepCost(cost.points)
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def run(self, num_rows, num_keys):
        self.num_runs += 1
        self.now += self.cost.seconds(num_rows, num_rows * num_keys) * self.noise(self.now)


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("STERNA_HOME", str(tmp_path))
    return tmp_path


def off(found, num_rows, num_keys=500):
    """How far the ratio to a step of one row, which decides, is from the true one."""
    got = found.seconds(num_rows, num_rows * num_keys) / found.seconds(1, num_keys)
    return got / (COST.seconds(num_rows, num_rows * num_keys) / COST.seconds(1, num_keys))


def test_costs_between_and_beyond_the_measured_sizes():
    cost = StepCost([CostPoint(1, 1.0), CostPoint(4, 4.0, 0.4), CostPoint(8, 6.0, 0.8)])
    assert cost.seconds(1, 0) == 1.0
    assert cost.seconds(2, 0) == pytest.approx(2.0)
    assert cost.seconds(6, 0) == pytest.approx(5.0)
    assert cost.seconds(16, 0) == pytest.approx(12.0)
    assert cost.seconds(4, 400) == pytest.approx(4.0 + 0.1 * 400)


def test_on_a_quiet_machine_it_takes_two_rounds_or_a_second(monkeypatch):
    machine = Machine(monkeypatch)
    found = measure(machine.run, 64, 2000)
    assert not found.unconfirmed()
    assert machine.now < 1.1 * LIMIT_S
    for n in (2, 5, 8, 20, 64):
        assert off(found.cost(), n) == pytest.approx(1, abs=0.02)


def test_a_busy_second_is_waited_out(monkeypatch):
    """Everything takes up to four times as long for 1.2 s, unevenly; the rest is quiet."""
    draw = random.Random(0)
    machine = Machine(monkeypatch, lambda now: draw.uniform(1.5, 4) if now < 1.2 else 1.0)
    found = measure(machine.run, 64, 2000)
    assert machine.now < 1.1 * LONGEST_S
    assert not found.unconfirmed()
    for n in (2, 8, 64):
        assert off(found.cost(), n) == pytest.approx(1, abs=0.15)


def test_what_was_measured_on_a_busy_machine_is_mended_by_later_starts(monkeypatch):
    """One run in five is undisturbed, the others take 1.2 to 5 times as long."""
    draw = random.Random(1)
    noise = [lambda now: 1.0 if draw.random() < 0.2 else draw.uniform(1.2, 5)]
    machine = Machine(monkeypatch, lambda now: noise[0](now))
    first = tuned("key", machine.run, 64, 2000)
    assert not load("key").is_final
    noise[0] = lambda now: 1.0
    second = tuned("key", machine.run, 64, 2000)
    assert load("key").is_final
    assert max(abs(off(second, n) - 1) for n in (2, 8, 64)) < 0.02
    assert max(abs(off(first, n) - 1) for n in (2, 8, 64)) > 0.02
    runs = machine.num_runs
    assert tuned("key", machine.run, 64, 2000).points == second.points
    assert machine.num_runs == runs, "what is confirmed is not measured again"


def test_a_size_that_is_odd_indeed_does_not_cost_every_start(monkeypatch):
    odd = StepCost([CostPoint(n, 2e-3 if n != 3 else 4e-3) for n in (1, 2, 3, 4, 64)])
    machine = Machine(monkeypatch)
    machine.cost.seconds = lambda n, k: 4e-3 if n == 3 else odd.seconds(1, 0)
    for _ in range(MAX_STARTS):
        assert load("key") is None or not load("key").is_final
        tuned("key", machine.run, 64, 2000)
    runs = machine.num_runs
    cost = tuned("key", machine.run, 64, 2000)
    assert machine.num_runs == runs
    seconds = [cost.seconds(n, 0) for n in range(1, 65)]
    assert seconds == sorted(seconds)


def test_a_short_context_or_few_rows_are_measured_as_far_as_they_go(monkeypatch):
    machine = Machine(monkeypatch)
    assert set(measure(machine.run, 4, 4).least) == {(n, 0) for n in (1, 2, 3, 4)}
    assert measure(machine.run, 1, 2000).cost().seconds(1, 0) > 0


DAMAGED = [
    "",
    "[]",
    '{"points": []}',
    '{"jobs": [], "num_starts": 1}',
    '{"jobs": [[1, 32, -1, 2]], "num_starts": 1}',
    '{"jobs": [[1, 32, 3, 2]], "num_starts": 1}',
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_is_measured_anew(monkeypatch, own_home, text):
    machine = Machine(monkeypatch)
    want = tuned("key", machine.run, 8, 500)
    (path,) = own_home.glob("stepcost/*.json")
    path.write_text(text)
    assert load("key") is None
    again = tuned("key", machine.run, 8, 500)
    assert [p.num_rows for p in again.points] == [p.num_rows for p in want.points]
    assert load("key") is not None
    assert load("another") is None


def test_a_home_that_cannot_be_written_is_no_error(monkeypatch, caplog):
    machine = Machine(monkeypatch)
    monkeypatch.setattr(costfile, "write_atomic", refuse)
    tuned("key", machine.run, 8, 500)
    assert "are not kept" in caplog.text


def refuse(*args):
    raise OSError(30, "Read-only file system")


def test_the_level_follows_a_slower_machine_and_survives_a_pause():
    cost = StepCost(COST.points)
    for _ in range(200):
        cost.note(2, 200, 3 * COST.seconds(2, 200))
    assert cost.seconds(2, 200) == pytest.approx(3 * COST.seconds(2, 200), rel=0.01)
    assert cost.seconds(64, 64) == pytest.approx(3 * COST.seconds(64, 64), rel=0.1)
    before = cost.seconds(2, 200)
    cost.note(2, 200, 120.0)  # the process was stopped for two minutes
    assert cost.seconds(2, 200) < 1.2 * before
    assert cost.departure() < CLIP


def test_real_steps_mend_a_size_that_was_measured_too_dear():
    """As happened: 2 rows 8.3 ms after 1 row 3.1 ms, where 2.1 and 2.1 were true."""
    true = StepCost([CostPoint(1, 2.1e-3), CostPoint(2, 2.1e-3), CostPoint(8, 4e-3)])
    cost = StepCost([CostPoint(1, 3.1e-3), CostPoint(2, 8.3e-3), CostPoint(8, 8.4e-3)])
    draw = random.Random(0)
    for _ in range(1000):
        n = draw.choice([1, 2, 2, 8])
        cost.note(n, 0, true.seconds(n, 0) * draw.uniform(1, 1.3), has_drafts=n > 1)
    assert cost.seconds(2, 0) / cost.seconds(1, 0) == pytest.approx(1.0, abs=0.1)
    assert cost.seconds(8, 0) / cost.seconds(1, 0) == pytest.approx(4 / 2.1, rel=0.15)
    assert cost.departure() > 1.5
    seconds = [cost.seconds(n, 0) for n in range(1, 12)]
    assert seconds == sorted(seconds)


def test_the_noise_of_real_steps_is_no_departure():
    cost = StepCost(COST.points)
    draw = random.Random(0)
    for i in range(5000):
        n = draw.choice([1, 4, 9, 33])
        busy = 2.5 if i // 500 % 2 else 1.0  # for hundreds of steps at a time
        seconds = COST.seconds(n, n) * busy * draw.choice([1, 1.1, 1.4, 3])
        cost.note(n, n, seconds, has_drafts=n > 1)
    assert cost.departure() < 1.25
    assert cost.seconds(33, 33) / cost.seconds(1, 1) == pytest.approx(
        COST.seconds(33, 33) / COST.seconds(1, 1), rel=0.2
    )


def test_a_contradicted_measurement_is_thrown_away_at_the_end(monkeypatch):
    machine = Machine(monkeypatch)
    cost = tuned("key", machine.run, 64, 2000)
    review("key", cost)
    assert load("key") is not None
    for _ in range(int(4 * KNOWN)):
        cost.note(1, 0, COST.seconds(1, 0))
        cost.note(8, 0, 2.5 * COST.seconds(8, 0), has_drafts=True)
    review("key", cost)
    assert load("key") is None
    save("key", measure(machine.run, 64, 2000))
    assert load("key") is not None


def test_garbage_of_a_hopeless_machine_stays_sane_and_is_not_final(monkeypatch):
    """Two threads among eight: up to fifty times as long, at every start."""
    draw = random.Random(2)
    machine = Machine(monkeypatch, lambda now: 1 + draw.expovariate(0.1))
    for _ in range(2 * MAX_STARTS):
        cost = tuned("key", machine.run, 64, 2000)
        assert not load("key").is_final
        seconds = [cost.seconds(n, 0) for n in range(1, 65)]
        assert seconds == sorted(seconds)
        assert all(s <= 1.001 * (n + 1) * seconds[0] for n, s in enumerate(seconds))
