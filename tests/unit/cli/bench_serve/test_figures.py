"""From records to figures; each expected value is worked out by hand."""

from __future__ import annotations

import json

import pytest

from sterna.cli.bench_serve.drive import RunResult
from sterna.cli.bench_serve.effective import effective_throughput, is_effective, worst_ema
from sterna.cli.bench_serve.metrics import details, summarize
from sterna.cli.bench_serve.options import LoadOptions, ReportOptions
from sterna.cli.bench_serve.plot import draw_curves
from sterna.cli.bench_serve.record import Record, read_reply
from sterna.cli.bench_serve.report import print_figures
from sterna.cli.bench_serve.wire import Reply

# Two answered requests and a failed one, over 4 s.
FAST = Record(
    prompt_len=512, output_len=3, start=0.0, ttft=0.5, itls=(0.1, 0.1), latency=0.7, text="abc"
)
SLOW = Record(prompt_len=100, output_len=2, start=0.5, ttft=1.0, itls=(2.0,), latency=3.0)
LOST = Record(prompt_len=100, start=0.1, latency=0.2, error="connection")
RUN = RunResult([FAST, SLOW, LOST], duration=4.0, probe_latencies=[0.1, 0.3])


def test_figures_of_a_known_run():
    options = ReportOptions(goodput=("ttft:600", "e2el:1000"), metric_percentiles="50,99")
    figures = summarize(RUN, options)
    expected = {
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 612,
        "total_output_tokens": 5,
        "request_throughput": 0.5,
        "request_goodput": 0.25,
        "output_throughput": 1.25,
        "total_token_throughput": 617 / 4,
        "mean_ttft_ms": 750,
        "median_ttft_ms": 750,
        "p50_itl_ms": 100,
        "mean_tpot_ms": (100 + 2000) / 2,
        "mean_e2el_ms": (700 + 3000) / 2,
        "max_concurrent_requests": 2,
        # FAST's three tokens come at 0.5, 0.6, 0.7 s, SLOW's at 1.5 and 3.5 s.
        "max_output_tokens_per_s": 3,
        "probe_completed": 2,
        "mean_probe_ms": 200,
    }
    for key, value in expected.items():
        assert figures[key] == pytest.approx(value), key
    json.dumps(figures)  # every value is plain


def test_the_keys_of_vllm_bench_serve_are_there():
    figures = summarize(RUN, ReportOptions())
    for name in ("ttft", "tpot", "itl", "e2el"):
        for statistic in ("mean", "median", "std", "p99"):
            assert f"{statistic}_{name}_ms" in figures
    assert {"duration", "completed", "request_goodput", "output_throughput"} <= set(figures)
    assert {"input_lens", "output_lens", "ttfts", "itls", "start_times", "errors"} <= set(
        details(RUN.records)
    )


def test_a_run_without_answers_has_figures():
    figures = summarize(RunResult([LOST], 1.0), ReportOptions())
    assert figures["completed"] == 0
    assert figures["max_output_tokens_per_s"] == 0


def test_effective_throughput_needs_prompt_and_gaps_in_time():
    # FAST: 512 tokens may take 1 s to the first; gaps of 0.1 s keep 6 tokens/s. SLOW: 100 tokens
    # may take 0.195 s, it took 1 s; with ten times the allowance its 2 s gap fails 2 tokens/s.
    assert is_effective(FAST, 6, 1.0)
    assert not is_effective(FAST, 11, 1.0)
    assert not is_effective(SLOW, 0.4, 1.0)
    assert is_effective(SLOW, 0.4, 10.0)
    assert not is_effective(SLOW, 2, 10.0)
    assert effective_throughput([FAST, SLOW, LOST], 4.0, (2, 6), 1.0) == {"2": 0.25, "6": 0.25}


def test_ema_is_pandas_ewm_of_span_16():
    # Worked by hand with decay k = 15/17: after 1: 1; after 1, 3: (1k + 3)/(k + 1).
    keep = 15 / 17
    assert worst_ema([1.0, 3.0]) == pytest.approx((keep + 3) / (keep + 1))
    assert worst_ema([2.0] * 50) == pytest.approx(2.0)
    assert worst_ema([]) == 0
    # One long gap among many short ones is averaged away to about 2/17 of its size.
    assert worst_ema([0.01] * 40 + [1.0]) == pytest.approx(0.01 + 0.99 * 2 / 17, rel=0.01)


def _reply(*events, status=200):
    reply = Reply(status=status)
    reply.events = [(at, json.dumps(event).encode()) for at, event in events]
    return reply


def test_chat_roles_and_usage_are_no_tokens():
    reply = _reply(
        (10.1, {"choices": [{"delta": {"role": "assistant", "content": ""}}]}),
        (10.5, {"choices": [{"delta": {"content": "a"}}]}),
        (10.7, {"choices": [{"delta": {"content": "b"}}]}),
        (10.7, {"choices": [{"delta": {}, "finish_reason": "stop"}]}),
        (10.9, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}),
    )
    reply.events.append((10.9, b"[DONE]"))
    record = read_reply(reply, 5, sent=10.0, ended=11.0, run_start=9.0, queued=0.25)
    assert record.ttft == pytest.approx(0.5)
    assert record.itls == pytest.approx((0.2,))
    assert record.latency == pytest.approx(0.7)
    assert (record.prompt_len, record.output_len) == (7, 4)
    assert (record.text, record.start, record.queued) == ("ab", 1.0, 0.25)


def test_errors_in_a_stream_or_a_status_are_failures():
    reply = _reply((1.0, {"error": {"message": "boom"}}))
    assert "boom" in read_reply(reply, 1, 0.0, 1.0, 0.0, 0.0).error
    refused = Reply(status=429, body=bytearray(b"queue full"))
    assert read_reply(refused, 1, 0.0, 1.0, 0.0, 0.0).error == "HTTP 429: queue full"


def test_the_printed_table_has_vllms_labels(capsys):
    options = ReportOptions(percentile_metrics="ttft,itl", goodput=("ttft:600",))
    print_figures(summarize(RUN, options), options)
    out = capsys.readouterr().out
    for label in ("Successful requests:", "Request goodput (req/s):", "Mean TTFT (ms):",
                  "P99 ITL (ms):", "Probe Requests", "Effective at 4 tok/s"):  # fmt: skip
        assert label in out
    assert "TPOT" not in out


def test_options_that_contradict_are_refused():
    for fields in (
        {"ramp_up_strategy": "linear"},
        {"ramp_up_start_rps": 1.0},
        {"dataset_name": "trace"},
    ):
        with pytest.raises(ValueError, match=r"ramp_up|trace"):
            LoadOptions(**fields)
    with pytest.raises(ValueError, match="unknown metric"):
        ReportOptions(percentile_metrics="ttf")
    assert ReportOptions(sweep="concurrency=1,2").sweep_points() == ("concurrency", (1.0, 2.0))


def test_a_curve_is_drawn(tmp_path):
    figures = summarize(RUN, ReportOptions())
    path = tmp_path / "img" / "curve.png"
    draw_curves({"a": [figures, figures]}, path, "title")
    assert path.read_bytes().startswith(b"\x89PNG")
