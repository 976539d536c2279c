"""The measured budget and the predicted wait."""

from __future__ import annotations

import json
import time

import pytest

from sterna.core.errors import ConfigError
from sterna.engine.budget import (
    LIMIT_S,
    StepCurve,
    StepTime,
    choose_budget,
    load_curve,
    measure_curve,
    save_curve,
)
from sterna.engine.build import tune_budget
from sterna.engine.request import StepStats
from sterna.engine.stats import MAX_WAIT_S, RetrySlots, SpeedMeter


def curve(times):
    return StepCurve(tuple(StepTime(size, seconds) for size, seconds in times.items()))


def test_the_knee_is_the_smallest_size_near_the_best():
    # tokens/s: 3200, 5333, 6244, 6400, 6400
    measured = curve({32: 0.01, 64: 0.012, 128: 0.0205, 256: 0.04, 512: 0.08})
    assert measured.knee() == 128
    assert choose_budget(measured, 64) == 128
    assert choose_budget(measured, 120) == 160  # a full batch of decodes leaves a quarter
    assert measured.widest() == 512
    assert curve({128: 0.02, 256: 0.04, 512: 0.095}).widest() == 256


def test_measuring_stops_at_its_time_limit_and_at_the_peak():
    calls = []

    def slow(size):
        calls.append(size)
        time.sleep(size / 1000)

    start = time.monotonic()
    measure_curve(slow, 1024)
    assert time.monotonic() - start < 2 * LIMIT_S
    calls.clear()

    def flat(size):
        calls.append(size)
        time.sleep(1e-5 * size)

    def drifting(size):
        calls.append(size)
        time.sleep((3e-5 if len(calls) < 9 else 1e-5) * size)

    measured = measure_curve(drifting, 400)
    assert measured.points[0].seconds < 2e-5 * 32  # the slow first round decides nothing
    calls.clear()
    measured = measure_curve(flat, 100)
    assert max(calls) == 64
    assert [point.num_tokens for point in measured.points] == [32, 64]


def test_a_kept_curve_is_found_again_and_a_damaged_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("STERNA_HOME", str(tmp_path))
    assert load_curve("a") is None
    save_curve("a", curve({32: 0.5}))
    assert load_curve("a") == curve({32: 0.5})
    assert load_curve("b") is None
    (path,) = (tmp_path / "budget").iterdir()
    for damage in ("{", "[]", json.dumps({"points": [{"num_tokens": 0, "seconds": 1}]})):
        path.write_text(damage)
        assert load_curve("a") is None


def test_a_curve_of_a_busy_machine_is_contradicted_and_then_merged():
    def run(size):
        time.sleep(1e-4 * size)

    assert curve({32: 0.2, 64: 0.5}).is_contradicted(run)
    assert not curve({32: 1e-4 * 32, 64: 0.5}).is_contradicted(run)
    merged = curve({32: 0.2, 64: 0.5, 1024: 3.0}).merged(curve({64: 0.1, 32: 0.3, 128: 0.2}))
    assert merged == curve({32: 0.2, 64: 0.1, 128: 0.2, 1024: 3.0})


def test_a_start_on_a_quiet_machine_replaces_a_busy_measurement(tmp_path, monkeypatch, harness):
    monkeypatch.setenv("STERNA_HOME", str(tmp_path))
    engine = harness().engine
    save_curve("a", curve({32: 100.0}))
    found = tune_budget(engine, "a")
    assert len(found.points) > 1 and found.points[0].seconds < 50
    assert load_curve("a") == found
    monkeypatch.setattr(engine.runner, "run_probe", lambda size: time.sleep(1.0))
    assert tune_budget(engine, "a") == found  # busy now: what was measured stays


def test_the_budget_is_bounded_by_the_buffers(harness):
    engine = harness().engine
    engine.set_token_budget(500)
    assert engine.scheduler.token_budget == 500
    with pytest.raises(ConfigError, match="allowed is 1 to 1024"):
        engine.set_token_budget(1025)
    with pytest.raises(ConfigError, match="allowed is 1 to 1024"):
        engine.set_token_budget(500, 2000)


def step(duration, prompt, decode=0):
    return StepStats(
        step=1,
        started=0.0,
        duration=duration,
        num_decode_tokens=decode,
        num_prompt_tokens=prompt,
        num_running=1,
        num_waiting=0,
        num_preempted=0,
        kv_usage=0.0,
        token_budget=64,
    )


def test_predicted_wait_follows_the_measured_speed():
    meter = SpeedMeter(1000.0)
    assert meter.predict_wait_s(1, 2000, True) == pytest.approx(2.0)
    for _ in range(200):
        meter.note_step(step(0.1, 50))
    assert meter.predict_wait_s(1, 2000, True) == pytest.approx(4.0, rel=0.01)
    for _ in range(1000):
        meter.note_step(step(0.1, 0, 8))
        meter.note_finished(1)
    # ten requests end a second: 30 waiting for a place take 3 s, whatever their prompts
    assert meter.predict_wait_s(30, 10, False) == pytest.approx(3.0, rel=0.1)
    assert meter.predict_wait_s(30, 10, True) == pytest.approx(0.1)


def test_refused_clients_get_slots_one_behind_the_other():
    slots = RetrySlots()
    waits = [slots.take(100.0, 0.5, 0.1) for _ in range(4)]
    assert waits == pytest.approx([0.5, 0.6, 0.7, 0.8])
    # ... which time takes away: a minute later nobody waits for those who never came back.
    assert slots.take(160.0, 0.5, 0.1) == pytest.approx(0.5)
    assert max(slots.take(160.0, 0.5, 10.0) for _ in range(100)) == MAX_WAIT_S
