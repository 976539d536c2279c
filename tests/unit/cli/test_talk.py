"""`complete` and `chat` against a server, and the in-process transport against an app."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from fake_openai import FakeServer, serving
from rich.console import Console

from sterna.cli import main as cli
from sterna.cli.chat import COMMANDS, Conversation
from sterna.cli.endpoint import Endpoint, EndpointError, InProcessTransport, refusal, remote
from sterna.cli.sampling import SamplingOptions
from sterna.core.errors import RequestError
from sterna.engine.request import SamplingParams


@pytest.mark.parametrize("is_chat", [False, True])
def test_complete_streams_to_stdout(capsys, is_chat):
    fake = FakeServer()
    with serving(fake) as url:
        arguments = ["complete", "hello there", "--url", url, "--max-tokens", "4", "--top-k", "7"]
        assert cli.run(arguments + ["--chat"] * is_chat) == 0
    assert capsys.readouterr().out == "word word word word \n"
    body = fake.bodies[0]
    assert body["max_tokens"] == 4
    assert body["top_k"] == 7
    assert "temperature" not in body  # unset options are left to the server
    assert ("messages" in body) == is_chat


def test_complete_json_prints_the_whole_answer(capsys):
    with serving(FakeServer()) as url:
        assert cli.run(["complete", "x", "--url", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["usage"]["completion_tokens"] == 256


def test_complete_reads_a_pipe_and_refuses_nothing(capsys, monkeypatch):
    fake = FakeServer()
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    with serving(fake) as url:
        assert cli.run(["complete", "--url", url, "--max-tokens", "1"]) == 0
    assert fake.bodies[0]["prompt"] == "from a pipe"
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli.run(["complete"]) == 2
    assert "no prompt" in capsys.readouterr().err


def test_settings_without_effect_are_said(capsys):
    with serving(FakeServer()) as url:
        arguments = ["complete", "x", "--url", url, "--max-tokens", "1"]
        assert cli.run([*arguments, "--token-budget", "64", "--api-key", "k"]) == 0
    assert "token_budget: engine settings have no effect with --url" in capsys.readouterr().err


def test_a_refused_completion_is_one_line(capsys):
    fake = FakeServer()
    fake.refusals = [400]
    with serving(fake) as url:
        assert cli.run(["complete", "x", "--url", url]) == 1
    assert capsys.readouterr().err == "sterna: error: refused 400 [/red] [0] (HTTP 400)\n"


def test_refusals_tell_whose_fault_it_is():
    assert isinstance(refusal(404, b'{"error": {"message": "no such model"}}'), RequestError)
    assert isinstance(refusal(500, b"<html>"), EndpointError)


def test_sampling_options_are_fields_of_the_engine_or_of_openai():
    known = set(SamplingParams.__dataclass_fields__) | {"json_schema"}
    assert set(SamplingOptions.model_fields) <= known
    body = SamplingOptions(stop=("a", "b"), json_schema='{"type": "object"}').body()
    assert body["stop"] == ["a", "b"]
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}


def _converse(url, lines):
    out = io.StringIO()
    console = Console(file=out, highlight=False, width=100)
    with asyncio.Runner() as runner:
        opened = remote(url, "", "")
        endpoint = runner.run(opened.__aenter__())
        talk = Conversation(console, endpoint, runner, SamplingOptions(max_tokens=2), "be brief")
        for line in lines:
            talk.take(line)
        runner.run(opened.__aexit__(None, None, None))
    return talk, out.getvalue()


def test_a_conversation_keeps_its_turns():
    fake = FakeServer()
    with serving(fake) as url:
        talk, out = _converse(url, ["one", "two"])
    assert "word word" in out
    roles = [message["role"] for message in fake.bodies[1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert len(talk.messages) == 4
    assert "first token after" in talk.last_stats


def test_commands(tmp_path):
    fake = FakeServer()
    saved = tmp_path / "talk.json"
    with serving(fake) as url:
        lines = ["/retry", "hi", "/retry", "/set top-k=5", "/set top_k=x", "/set topk=5",
                 "/set stop=END", "/set", f"/save {saved}", "/hlep", "/help", "/stats",
                 "/quit"]  # fmt: skip
        talk, out = _converse(url, lines)
    assert fake.bodies[0]["messages"] == fake.bodies[1]["messages"]
    assert talk.sampling.top_k == 5 and talk.sampling.stop == ("END",)
    assert "did you mean 'top_k'" in out
    assert "nothing was answered yet" in out
    assert "--top-k" in out  # the refused value
    assert "did you mean 'help'" in out
    assert all(f"/{name}" in out for name in COMMANDS)
    assert [m["role"] for m in json.loads(saved.read_text())] == ["system", "user", "assistant"]
    assert talk.is_over
    talk.take("/clear")
    assert talk.messages == []
    talk.take("/system other")
    assert talk.system == "other"


def test_a_refused_question_is_forgotten():
    fake = FakeServer()
    fake.refusals = [400]
    with serving(fake) as url:
        talk, out = _converse(url, ["bad"])
    assert "refused 400 [/red] [0]" in out  # brackets are text, not markup
    assert talk.messages == []


def test_the_in_process_transport_streams_as_it_is_written():
    fake = FakeServer(gap_s=0.05)
    body = {"prompt": "a b", "max_tokens": 3, "stream": True}

    async def go():
        transport = InProcessTransport(fake.app)
        times = []
        loop = asyncio.get_running_loop()
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://x") as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            async for line in response.aiter_lines():
                if "word" in line:
                    times.append(loop.time())
        return times

    times = asyncio.run(go())
    assert len(times) == 3
    assert times[2] - times[0] >= 0.09  # not all at the end


def test_leaving_a_stream_tells_the_app():
    gone = []

    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        gone.append((await receive())["type"])

    async def go():
        transport = InProcessTransport(app)
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://x") as client,
            client.stream("GET", "/") as response,
        ):
            assert response.status_code == 200

    asyncio.run(go())
    assert gone == ["http.disconnect"]


def test_a_text_with_unicode_line_ends_is_one_event():
    """Servers send U+2028 as it is: a line end to Python, but not to an event stream."""
    text = "a\x85b\u2028c\u2029d"
    event = json.dumps({"choices": [{"text": text}]}, ensure_ascii=False)
    body = f"data: {event}\r\n\r\ndata: [DONE]\r\n\r\n".encode()

    async def read():
        transport = httpx.MockTransport(lambda _: httpx.Response(200, content=body))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return [e async for e in Endpoint(client, "m").stream("/v1/completions", {})]

    assert asyncio.run(read()) == [{"choices": [{"text": text}]}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_one_line():
    with serving(FakeServer()) as url, open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sterna.cli", "complete", "x", "--url", url],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "No space left" in done.stderr
