"""Groups of actors: results by rank, errors by name, and what becomes of ranks that die or hang."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from sterna.align.spawn import spawn
from sterna.align.workers import LocalGroup, everyone
from sterna.core.errors import ConfigError, WorkerError

FACTORY = "tests.unit.align.test_workers:Actor"


class Actor:
    """Does what the tests ask."""

    def __init__(self, rank, sleeps=0.0):
        self.rank = rank
        time.sleep(sleeps)

    def add(self, a, b):
        return self.rank, a + b

    def pid(self):
        return os.getpid()

    def fail(self, kind):
        if kind == "typed":
            raise ConfigError(f"bad on {self.rank}", param="x")
        raise ValueError(f"odd on {self.rank}")

    def wait(self, seconds):
        time.sleep(seconds)
        return self.rank

    def wait_on(self, rank, seconds):
        time.sleep(seconds if rank == self.rank else 0)

    def close(self):
        pass


@pytest.fixture
def pair(monkeypatch):
    root = str(Path(__file__).parents[3])
    monkeypatch.setenv("PYTHONPATH", root)
    group = spawn(FACTORY, [(0,), (1,)], timeout_s=60)
    yield group
    group.close()


@pytest.mark.parametrize("kind", ["local", "spawned"])
def test_calls_go_to_every_rank(kind, request):
    group = LocalGroup([Actor(0), Actor(1)]) if kind == "local" else request.getfixturevalue("pair")
    assert group.size == 2
    group.start("add", [(1, 2), (3, 4)])
    assert group.finish() == [(0, 3), (1, 7)]
    assert everyone(group, "add", 5, 6) == [(0, 11), (1, 11)]
    with pytest.raises(ConfigError, match="bad on"):
        everyone(group, "fail", "typed")
    assert everyone(group, "add", 0, 0) == [(0, 0), (1, 0)]  # an error does not end the group


def test_a_foreign_error_brings_its_traceback(pair):
    with pytest.raises(WorkerError, match=r"(?s)rank 0 raised:.*Traceback.*ValueError: odd on 0"):
        everyone(pair, "fail", "other")


def test_a_killed_rank_is_named_at_once(pair):
    pids = everyone(pair, "pid")
    pair.start("wait_on", [(1, 600), (1, 600)])
    started = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(
        WorkerError, match=r"rank 1 \(process \d+ .*\) died of signal 9 in `wait_on"
    ):
        pair.finish()
    assert time.monotonic() - started < 60
    with pytest.raises(WorkerError, match="rank 1"):
        pair._method = ""
        everyone(pair, "pid")


def test_a_hanging_rank_is_named_with_its_stack(pair, caplog):
    pair._timeout_s = 2.0
    with pytest.raises(WorkerError, match=r"rank 1 \(.*\) did not answer `wait_on` within 2 s"):
        everyone(pair, "wait_on", 1, 600)
    assert "in wait_on" in caplog.text


def test_an_actor_that_cannot_be_built_ends_all(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    with pytest.raises(WorkerError, match=r"(?s)rank 1 raised:.*TypeError"):
        spawn(FACTORY, [(0,), ()], timeout_s=60)
