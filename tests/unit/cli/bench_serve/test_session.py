"""Whole runs of `sterna bench serve` against the fake server."""

from __future__ import annotations

import json
import time

import pytest
from fake_openai import FakeServer, serving

from sterna.cli import main as cli

# The common words stand in for a tokenizer, so these tests need no model.
NO_TOKENIZER = ["--tokenizer", "nowhere/model.gguf"]


def _bench(url, *options):
    return cli.run(["bench", "serve", "--base-url", url, *NO_TOKENIZER, *options])


def test_figures_match_the_servers_pace(capsys):
    fake = FakeServer(first_s=0.1, gap_s=0.02)
    with serving(fake) as url:
        options = ["--num-prompts", "6", "--output-len", "5", "--max-concurrency", "3", "--json"]
        assert _bench(url, *options, "--input-len", "20") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["completed"] == 6
    assert result["total_output_tokens"] == 30
    assert result["total_input_tokens"] == 120
    assert result["max_concurrent_requests"] == fake.most_running == 3
    # Sleeps are never short; the upper bounds leave room for a busy machine.
    assert 100 <= result["median_ttft_ms"] < 180
    assert 20 <= result["median_itl_ms"] < 60
    assert result["model_id"] == "fake"
    assert result["machine"]["num_cpus"] >= 1


def test_chat_goodput_detail_and_file(tmp_path, capsys):
    fake = FakeServer()
    with serving(fake) as url:
        code = _bench(
            url, "--backend", "openai-chat", "--num-prompts", "3", "--output-len", "2",
            "--goodput", "ttft:5000", "e2el:5000", "--save-result",
            "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "r.json",
            "--metadata", "note=hello", "by=me", "--ignore-eos", "--header", "X-A=1", "X-B=2",
        )  # fmt: skip
    assert code == 0
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["request_goodput"] == pytest.approx(saved["request_throughput"])
    assert saved["note"] == "hello" and saved["by"] == "me"
    assert len(saved["itls"]) == 3
    assert fake.bodies[-1]["messages"]
    assert fake.bodies[-1]["ignore_eos"] is True
    assert "Mean TTFT (ms):" in capsys.readouterr().out


def test_a_sweep_measures_each_point_and_draws(tmp_path, capsys):
    curve = tmp_path / "curve.png"
    fake = FakeServer(first_s=0.01)
    with serving(fake) as url:
        options = ["--sweep", "concurrency=1,2", "--num-prompts", "4", "--output-len", "2"]
        assert _bench(url, *options, "--plot", str(curve), "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["max_concurrency"] for result in results] == [1, 2]
    prompts = [body["prompt"] for body in fake.bodies]
    assert len(set(prompts)) == len(prompts) == 10  # no prompt twice: caches are no help
    assert curve.exists()


def test_a_curve_that_cannot_be_drawn_loses_no_result(tmp_path, capsys):
    with serving(FakeServer()) as url:
        options = ["--sweep", "concurrency=1,2", "--num-prompts", "2", "--output-len", "2"]
        saving = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json"]
        assert _bench(url, *options, *saving, "--plot", str(tmp_path / "curve.nothing")) == 1
    assert "cannot draw" in capsys.readouterr().err
    assert len((tmp_path / "r.json").read_text().splitlines()) == 2


def test_a_trace_is_replayed_in_its_time(tmp_path, capsys):
    trace = tmp_path / "t.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.0000000,40,4\n"
        "2023-11-16 18:15:47.0000000,60,6\n"
    )
    with serving(FakeServer()) as url:
        options = ["--trace", str(trace), "--scale-rate", "5", "--scale-len", "0.5", "--json"]
        assert _bench(url, *options) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["total_input_tokens"] == 50
    assert result["total_output_tokens"] == 5
    assert 0.2 <= result["duration"] < 1.0


def test_failures_are_counted_and_nothing_answered_is_1(capsys):
    fake = FakeServer()
    fake.refusals = [500] * 5
    with serving(fake) as url:
        options = ["--num-warmups", "0", "--output-len", "1", "--json"]
        assert _bench(url, *options, "--num-prompts", "3") == 1
        assert json.loads(capsys.readouterr().out)["failed"] == 3
        assert _bench(url, *options, "--num-prompts", "4", "--probe-request-rate", "50") == 0
    assert json.loads(capsys.readouterr().out)["completed"] == 2


def test_no_server_is_one_line(capsys):
    assert _bench("http://127.0.0.1:9", "--ready-check-timeout-sec", "0") == 1
    err = capsys.readouterr().err
    assert "no server answers at http://127.0.0.1:9" in err
    assert err.count("\n") == 1


def test_the_client_costs_little_cpu(capsys):
    # The fake runs in this process too, so this bounds client and server together: a general
    # client alone takes about 100 us a token here.
    with serving(FakeServer()) as url:
        started = time.process_time()
        options = ["--num-prompts", "20", "--output-len", "500", "--max-concurrency", "4"]
        assert _bench(url, *options, "--json") == 0
        spent = time.process_time() - started
    assert json.loads(capsys.readouterr().out)["total_output_tokens"] == 10_000
    assert spent / 10_000 < 400e-6
