"""Parts of the wire: chunk bytes, event streams, percentiles, body reading, sockets."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sterna.core.errors import ConfigError, DeadlineError, PortInUseError, StepError
from sterna.engine.request import StepStats
from sterna.server.config import ServerConfig
from sterna.server.limits import read_body
from sterna.server.metrics import ServerMetrics
from sterna.server.replies import CachedTokens, Timing, Usage
from sterna.server.run import bind, check_tls
from sterna.server.stream import ChunkWriter, EventStream, chat_choice, encode_json, text_choice
from sterna.server.view import LiveView

USAGE = Usage(
    prompt_tokens=1,
    completion_tokens=2,
    total_tokens=3,
    prompt_tokens_details=CachedTokens(cached_tokens=1),
)
WRITER = ChunkWriter.open("id-1", "chat.completion.chunk", 5, 'a "model"', with_usage=True)


@given(st.text(), st.integers(0, 127))
@example("a\x85b\u2028c\u2029d\x1ee", 0)
def test_any_text_survives_a_chunk(text, index):
    delta = f'{{"content":{encode_json(text)}}}'
    for choice in (chat_choice(index, delta), text_choice(index, text)):
        raw = WRITER.chunk(choice)
        assert raw.startswith(b"data: {") and raw.endswith(b"}\n\n")
        # One event: a line end inside would cut it.
        assert raw.count(b"\n") == 2 and b"\r" not in raw
        assert raw.decode().splitlines() == [raw.decode().rstrip("\n"), ""]
        body = json.loads(raw[6:])
        (got,) = body["choices"]
        assert got["index"] == index and body["model"] == 'a "model"' and body["usage"] is None
        assert (got["text"] if "text" in got else got["delta"]["content"]) == text


def test_last_chunk_has_usage_and_timing():
    body = json.loads(WRITER.last(USAGE, Timing(e2e_s=1.5))[6:])
    assert body["choices"] == [] and body["usage"]["total_tokens"] == 3
    assert body["sterna"] == {"queue_s": None, "ttft_s": None, "e2e_s": 1.5}


def play(pieces, messages=()):
    """Run an EventStream over `pieces`; returns what it sent and how often it said goodbye."""
    sent, gone = [], []

    async def go():
        incoming = asyncio.Queue()
        for message in messages:
            incoming.put_nowait(message)

        async def send(message):
            sent.append(message)
            await asyncio.sleep(0)

        await EventStream(pieces(), lambda: gone.append(1))({}, incoming.get, send)

    asyncio.run(go())
    return sent, len(gone)


def test_event_stream_sends_pieces_and_ends():
    async def pieces():
        yield b"one"
        yield b"two"

    sent, gone = play(pieces)
    assert (
        sent[0]["status"] == 200
        and b"text/event-stream" in dict(sent[0]["headers"])[b"content-type"]
    )
    assert [message["body"] for message in sent[1:]] == [b"one", b"two", b""]
    assert [message["more_body"] for message in sent[1:]] == [True, True, False] and not gone


def test_an_error_before_the_first_piece_starts_no_answer():
    async def pieces():
        raise StepError("broken")
        yield b""

    with pytest.raises(StepError):
        play(pieces)


def test_disconnect_is_told_once_while_pieces_flow():
    async def pieces():
        for _ in range(5):
            yield b"x"
            await asyncio.sleep(0.001)

    _, gone = play(pieces, [{"type": "http.request"}, {"type": "http.disconnect"}])
    assert gone == 1


def step(number):
    return StepStats(
        step=number, started=0.0, duration=0.01, num_decode_tokens=1, num_prompt_tokens=0,
        num_running=1, num_waiting=0, num_preempted=0, kv_usage=0.0, token_budget=8,
    )  # fmt: skip


def test_steps_since_gives_what_is_newer_and_kept():
    view = LiveView(ServerMetrics("sterna", "m"))
    for number in range(1, 5001):
        view.note_step(step(number))
    assert [s.step for s in view.steps_since(4997)] == [4998, 4999, 5000]
    assert view.steps_since(5000) == [] and view.steps_since(10**9) == []
    assert view.steps_since(-1)[0].step == 5000 - 4096 + 1
    assert view.totals.steps == 5000


def test_percentiles_are_nearest_rank():
    view = LiveView(ServerMetrics("sterna", "m"))
    assert view.latencies()["ttft_ms"] == {"p50": None, "p90": None, "p99": None}
    view._ttfts.extend(i / 1000 for i in range(100))
    assert view.latencies()["ttft_ms"] == {"p50": 50.0, "p90": 90.0, "p99": 99.0}


def test_two_apps_share_no_metrics():
    one, two = ServerMetrics("sterna", "m"), ServerMetrics("sterna", "m")
    one.preemptions.inc()
    assert b'num_preemptions_total{model_name="m"} 1.0' in one.render()
    assert b'num_preemptions_total{model_name="m"} 0.0' in two.render()


def test_a_body_that_does_not_come_is_timed_out():
    async def never():
        await asyncio.Event().wait()

    config = ServerConfig(body_timeout_s=0.01)
    with pytest.raises(DeadlineError, match="did not arrive"):
        asyncio.run(read_body({"headers": []}, never, config))


def test_bind_refuses_a_taken_port_and_takes_any_free_one():
    with bind(ServerConfig(port=0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"port {port}"):
            bind(ServerConfig(port=port))
        # A client that comes before the model is loaded waits in the backlog.
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    with bind(ServerConfig(port=port)):
        pass


def test_wrong_hosts_and_certificates_are_config_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"203\.0\.113\.9"):
        bind(ServerConfig(host="203.0.113.9", port=0))
    with pytest.raises(ConfigError, match="no address"):
        bind(ServerConfig(host="no such host", port=0))
    broken = tmp_path / "x.pem"
    broken.write_text("nothing")
    with pytest.raises(ConfigError, match="TLS"):
        check_tls(ServerConfig(ssl_certfile=broken, ssl_keyfile=broken))
    with pytest.raises(ValueError, match="go together"):
        ServerConfig(ssl_certfile=broken)
