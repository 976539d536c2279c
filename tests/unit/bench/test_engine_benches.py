"""The in-process benchmarks on an engine whose steps take known times."""

from __future__ import annotations

import random

import pytest

import decode_share
import splitfuse
from sterna.cli.bench_offline import OfflineBench, OfflineRun
from sterna.cli.bench_serve.options import ReportOptions
from sterna.engine.request import Delta, RequestOutput, RequestTiming

TIMING = RequestTiming(arrival=0.0)


class StepEngine:
    """One token to each open request a step; a step takes its new prompt tokens and `base_s`."""

    def __init__(self, clock, base_s=0.01, prompt_token_s=0.001):
        self.clock = clock
        self.base_s = base_s
        self.prompt_token_s = prompt_token_s
        self.left = {}
        self.new_tokens = 0
        self.runner = self
        self.captured = self.native

    def native(self, *counts):
        self.clock[0] += self.base_s + self.new_tokens * self.prompt_token_s
        self.new_tokens = 0

    @property
    def has_work(self):
        return bool(self.left)

    def add(self, request):
        assert request.request_id not in self.left
        self.left[request.request_id] = request.params.max_tokens
        self.new_tokens += len(request.prompt_token_ids)

    def step(self):
        self.captured()
        self.clock[0] += 0.001  # the Python of it
        outputs = []
        for name in list(self.left):
            self.left[name] -= 1
            is_finished = self.left[name] == 0
            if is_finished:
                del self.left[name]
            outputs.append(
                RequestOutput(
                    request_id=name,
                    deltas=(Delta(index=0, token_ids=(1,)),),
                    num_prompt_tokens=1,
                    num_cached_tokens=0,
                    timing=TIMING,
                    is_finished=is_finished,
                )
            )
        return outputs


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def test_python_share_is_what_the_native_call_leaves(clock):
    share = decode_share.measure(StepEngine(clock), batch=3)
    assert share.step_us == pytest.approx(11_000)
    assert share.python_share == pytest.approx(1 / 11)


def test_offline_run_parts_prefill_from_decode(clock):
    bench = OfflineBench.__new__(OfflineBench)
    bench._engine = StepEngine(clock)
    bench._random, bench._num_requests = random.Random(0), 0
    bench._clock = lambda: clock[0]
    run = bench.run(num_sequences=2, input_len=50, output_len=5)
    assert run.first_token_s == pytest.approx(0.111)
    assert run.total_s == pytest.approx(0.111 + 4 * 0.011)
    assert run.decode_tokens == 8
    assert run.decode_rate == pytest.approx(2 / 0.011)
    assert run.prefill_rate == pytest.approx(100 / 0.111)


def test_offline_rates():
    run = OfflineRun(4, 10, 5, first_token_s=1.0, total_s=2.0, decode_tokens=16)
    assert (run.output_rate, run.decode_rate, run.prefill_rate) == (10, 16, 40)


def test_long_prompts_show_in_the_streams_gaps(clock):
    options = ReportOptions(sla="6,10", ttft_scale=4.0)
    figures = splitfuse.measure(StepEngine(clock), rate=0.5, seconds=20.0, options=options)
    # Whole prompts here: a 1,500-token prompt takes 1.5 s, and every stream waits for it.
    assert figures["stream_median_itl_ms"] == pytest.approx(11, abs=1)
    assert figures["stream_p99_itl_ms"] > 1000
    assert figures["failed"] == 0
    # An average over 16 gaps with one of 1.5 s exceeds 1/6 s.
    assert figures["effective_throughput"]["6"] < figures["request_throughput"]
    assert "p99" in splitfuse.line("whole-prompt", figures)


def test_both_policies_get_the_same_arrivals(clock):
    loads = [splitfuse.Load(StepEngine(clock), 0.5, 20.0, seed=0) for _ in range(2)]
    assert loads[0]._due == loads[1]._due
    flights, _ = loads[0].run()
    longs = [flight for flight in flights if not flight.is_stream]
    assert len(longs) == len(loads[1]._due)
    assert all(len(flight.times) == splitfuse.LONG_NEW for flight in longs)
    assert sum(flight.is_stream for flight in flights) >= splitfuse.NUM_STREAMS
