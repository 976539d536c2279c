"""Batch JSONL: every request gets exactly one result line, whatever happens in between."""

from __future__ import annotations

import asyncio
import json

import pytest
from fake_openai import FakeServer, serving

from sterna.cli import main as cli
from sterna.cli.batchfile import ResultFile, count_requests, parse_request, read_requests
from sterna.cli.batchrun import BatchRun
from sterna.cli.endpoint import EndpointError, remote
from sterna.core.errors import ConfigError


def _write_requests(path, count):
    lines = [
        {
            "custom_id": f"r{index}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": f"p {index}", "max_tokens": 3},
        }
        for index in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _results(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _run(url, source, output, concurrency=4):
    async def go():
        async with remote(url, "", "") as endpoint:
            run = BatchRun(endpoint, {"max_tokens": 2}, concurrency, lambda _: None)
            return await run.run(source, output)

    return asyncio.run(go())


def test_all_requests_are_answered_once(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    _write_requests(source, 20)
    fake = FakeServer(first_s=0.01)
    with serving(fake) as url:
        summary = _run(url, source, output)
    assert (summary.completed, summary.failed, summary.skipped) == (20, 0, 0)
    assert sorted(entry["custom_id"] for entry in _results(output)) == sorted(
        f"r{index}" for index in range(20)
    )
    entry = _results(output)[0]
    assert entry["response"]["status_code"] == 200
    assert entry["response"]["body"]["choices"][0]["text"] == "word word word "
    assert summary.completion_tokens == 60
    assert all(body["model"] == "fake" for body in fake.bodies)


def test_resume_skips_what_is_done_and_cuts_a_torn_line(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    _write_requests(source, 6)
    with serving(FakeServer()) as url:
        _run(url, source, output)
        lines = output.read_bytes().splitlines(keepends=True)
        output.write_bytes(b"".join(lines[:3]) + lines[3][:17])
        fake_again = FakeServer()
        with serving(fake_again) as again:
            summary = _run(again, source, output)
    assert summary.skipped == 3
    assert len(fake_again.bodies) == 3
    ids = [entry["custom_id"] for entry in _results(output)]
    assert len(ids) == len(set(ids)) == 6


def test_broken_lines_and_refusals_are_results(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        b'{"custom_id": "a", "prompt": "x"}\n'
        b"\n"
        b"not json\n"
        b"\xff\xfe\n"
        b'{"custom_id": "e", "url": "/v1/embeddings", "body": {}}\n'
        b'{"custom_id": "f"}\n'
        b'{"custom_id": "m", "messages": [{"role": "user", "content": "hi"}]}\n'
    )
    with serving(FakeServer()) as url:
        summary = _run(url, source, output)
    by_id = {entry["custom_id"]: entry for entry in _results(output)}
    assert (summary.completed, summary.failed) == (2, 4)
    assert "line 3 is no JSON" in by_id["line-3"]["error"]["message"]
    assert "line 4" in by_id["line-4"]["error"]["message"]
    assert "/v1/embeddings" in by_id["e"]["error"]["message"]
    assert by_id["m"]["response"]["body"]["choices"][0]["message"]["content"]


def test_busy_servers_are_waited_for_and_errors_recorded(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    _write_requests(source, 2)
    fake = FakeServer()
    fake.refusals = [429, 429, 400]
    with serving(fake) as url:
        summary = _run(url, source, output, concurrency=1)
    assert (summary.completed, summary.failed) == (1, 1)
    failed = next(e for e in _results(output) if e["response"]["status_code"] == 400)
    assert failed["response"]["body"]["error"]["message"] == "refused 400 [/red] [0]"


def test_a_lost_server_stops_the_run_and_records_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("sterna.cli.batchrun._NUM_RECONNECTS", 0)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    _write_requests(source, 3)

    async def go():
        async with remote("http://127.0.0.1:9", "", "m") as endpoint:
            await BatchRun(endpoint, {}, 2, lambda _: None).run(source, output)

    with pytest.raises(EndpointError, match="is it running"):
        asyncio.run(go())
    assert output.read_bytes() == b""


def test_two_runs_on_one_output_are_refused(tmp_path):
    with (
        ResultFile(tmp_path / "out"),
        pytest.raises(ConfigError, match="another run"),
        ResultFile(tmp_path / "out"),
    ):
        pass


@pytest.mark.parametrize(
    "text", ["my diary\n", "my diary", '{"custom_id": "a", "prompt": "x"}\n', "{", '{"id": "b"']
)
def test_foreign_output_is_not_overwritten(tmp_path, text):
    output = tmp_path / "out"
    output.write_text(text)
    if text == "{":  # may be the first byte of a result
        with ResultFile(output) as results:
            assert not results.finished
        return
    with pytest.raises(ConfigError, match="no batch result"), ResultFile(output):
        pass
    assert output.read_text() == text


def test_input_and_output_must_differ(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    _write_requests(source, 2)
    before = source.read_bytes()
    with serving(FakeServer()) as url:
        arguments = ["complete", "--url", url, "--input", str(source)]
        assert cli.run([*arguments, "--output", str(tmp_path / "." / "in.jsonl")]) == 2
    assert "one file" in capsys.readouterr().err
    assert source.read_bytes() == before


def test_a_server_that_restarts_is_waited_for(tmp_path):
    """503 is no answer: written down, it would be skipped by the next run."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    _write_requests(source, 2)
    fake = FakeServer()
    fake.refusals = [503]
    with serving(fake) as url:
        summary = _run(url, source, output, concurrency=1)
    assert (summary.completed, summary.failed) == (2, 0)


def test_duplicate_ids_and_missing_input_are_refused(tmp_path):
    request = parse_request(b'{"custom_id": "a", "prompt": "x"}', 1)
    with pytest.raises(ConfigError, match="twice"):
        count_requests([request, request])
    with pytest.raises(ConfigError, match="cannot read"):
        list(read_requests(tmp_path / "none"))


def test_the_verb_prints_its_summary(tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    _write_requests(source, 3)
    with serving(FakeServer()) as url:
        arguments = ["complete", "--input", str(source), "--output", str(output), "--url", url]
        assert cli.run([*arguments, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["completed"] == 3
        assert cli.run(arguments) == 0
    assert "3 were done before" in capsys.readouterr().out
